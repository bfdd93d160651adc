"""Kill a rank at each of its actions: every schedule, world size and transport, before to after.

One case is one job: `1f1b-p3-unix-rank1-1B2-during` has three ranks, and rank 1 is killed in the
midst of 1B2. Over processes that is SIGKILL; ranks that are threads cannot be killed, so over
inproc an exception is raised. After every case

1. the cause that is told names that rank and what happened to it, and so does the exit code;
2. every survivor has raised `JobFailed` with that cause, and knew what it was about itself, or was
   ended after the grace;
3. that was in time, and nothing is left: no process, thread, descriptor or shared memory.

The whole matrix, thousands of cases of some tenths of a second:

    python -m pytest tests/testing/test_fault_matrix.py --matrix=all

The suite runs 40 of them, others each time, about as many of each schedule over each transport;
pytest's output says at its end how to run the same ones again. One case is run again by
`--matrix=all -k NAME`, more of them by `--matrix=500`.
"""

from __future__ import annotations

import itertools

from matrix import MICROBATCHES, STEPS, THREADS, WORLD_SIZES, Case, cases, sample, train, transports

import barepp
from barepp.testing import run_with_fault
from barepp.worker.faults.kinds import WHEN

# Milliseconds in truth, as the summary at the end shows; but a machine may be shared by many.
TOLD_WITHIN_S = 5.0
ENDED_WITHIN_S = 10.0


def test_one_death(case: Case, told_ms: list[float]) -> None:
    outcome = run_with_fault(
        train,
        world=case.world_size,
        rank=case.rank,
        at=case.at,
        when=case.when,
        fault=case.fault,
        step=case.step,
        args=[case.schedule],
        transport=case.transport,
        grace=ENDED_WITHIN_S / 2,
        fork=True,
    )
    outcome.check(told_within_s=TOLD_WITHIN_S, ended_within_s=ENDED_WITHIN_S)
    assert sorted([case.rank, *outcome.survivors]) == list(range(case.world_size))
    for survivor in outcome.survivors.values():
        assert survivor.after_s is not None, survivor  # nobody here is so busy as to miss it
        told_ms.append(survivor.after_s * 1e3)


def test_the_matrix_is_complete() -> None:
    everything = cases()
    assert len({str(case) for case in everything}) == len(everything)
    for field, values in {
        "schedule": barepp.schedule_names(),
        "world_size": WORLD_SIZES,
        "transport": transports(),
        "when": WHEN,
        "step": range(STEPS),
    }.items():
        assert {getattr(case, field) for case in everything} == set(values), field
    assert {THREADS, "tcp", "unix"} <= set(transports())
    for schedule in barepp.schedule_names():
        for world_size in WORLD_SIZES:
            group = [c for c in everything if (c.schedule, c.world_size) == (schedule, world_size)]
            killed_at = {(case.transport, case.at, case.when) for case in group}
            stages = range(1 + max(int(case.at[0]) for case in group))
            for transport, stage, when in itertools.product(transports(), stages, WHEN):
                for microbatch in range(MICROBATCHES):
                    in_full, in_parts = (
                        {(transport, f"{stage}{kind}{microbatch}", when) for kind in kinds}
                        for kinds in ("FB", "FIW")
                    )
                    assert in_full <= killed_at or in_parts <= killed_at
            assert {case.rank for case in group} == set(range(world_size))


def test_a_sample_is_the_same_for_the_same_seed_and_leaves_nothing_out() -> None:
    drawn = sample(40, 7)
    assert drawn == sample(40, 7) != sample(40, 8)
    assert len(set(drawn)) == 40
    assert sorted(map(str, sample(10**6, 7))) == sorted(map(str, cases()))
    groups = {(case.schedule, case.transport) for case in drawn}
    assert len(groups) == min(40, len(barepp.schedule_names()) * len(transports()))
