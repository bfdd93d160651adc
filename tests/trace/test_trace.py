"""What a rank records of itself: small however long it runs, nothing when off, and true."""

from __future__ import annotations

import functools
import gc
import json
import tracemalloc

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from traces import check_format

import barepp
import barepp.trace.collect
from barepp.errors import UsageError
from barepp.program.actions import Action, Kind, parse_order
from barepp.program.lowering import lower
from barepp.trace.analysis import rank_times, transfers
from barepp.trace.chrome_format import messages
from barepp.trace.chrome_reader import read_trace
from barepp.trace.clock_sync import Reading
from barepp.trace.recorder import ACTIVATIONS, GRADIENTS, KEPT_STEPS, LOSS, NUM_ROWS, Recorder
from barepp.trace.summary import summarise
from barepp.worker.world import World
from transport.inproc import InprocHub, InprocTransport

MS = 1_000_000
run = functools.partial(barepp.run, transport="inproc")
ORDER = parse_order(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"])
PROGRAM = lower(ORDER, 2)[1]


def alone() -> World:
    return World(InprocTransport(InprocHub(1), 0))


def add_step(recorder: Recorder, *times: tuple[int, int, int, int]) -> None:
    recorder.begin_step()
    recorder.add_actions(PROGRAM[: len(times)], times)
    recorder.end_step()


# -- sums -----------------------------------------------------------------------------------------


def test_a_long_run_keeps_its_last_steps_alone():
    recorder = Recorder(tracing=True)
    for number in range(3 * KEPT_STEPS):
        add_step(recorder, (0, 0, number, number))
    assert len(recorder.steps) == len(recorder.traced) == KEPT_STEPS
    assert recorder.steps[-1].compute == 3 * KEPT_STEPS - 1
    [times] = summarise(alone(), Recorder(steps=_of_others_freed(recorder)), 3).ranks
    assert times.peak_in_flight == 3
    assert 2.4 * KEPT_STEPS < times.computing_ms * 1e6 < 2.6 * KEPT_STEPS


def _of_others_freed(recorder):
    """A world of one rank has nobody to wait for."""
    for times in recorder.steps:
        times.waits.clear()
    return recorder.steps


def test_the_first_step_warms_up_unless_it_is_the_only_one():
    recorder = Recorder()
    assert summarise(alone(), recorder, 0).step_ms == 0.0
    program = [step._replace(receive_from=None, send_to=None) for step in PROGRAM[:1]]
    for computed, expected in ((5 * MS, 5.0), (1 * MS, 1.0), (3 * MS, 2.0)):
        recorder.begin_step()
        recorder.add_actions(program, [(0, 0, computed, computed)])
        recorder.end_step()
        assert summarise(alone(), recorder, 0).computing_ms == [expected]


def test_a_step_is_split_where_it_happens():
    recorder = Recorder()
    recorder.begin_step()
    recorder.add_wait(NUM_ROWS, 0, 0, 5)
    recorder.add_actions(
        PROGRAM, [(0, 7, 10, 11), (11, 11, 20, 24), (24, 30, 31, 31), (31, 31, 40, 45)]
    )
    recorder.add_flush("waiting for its sends", 45, 52)
    recorder.add_flush("sharing the loss", 52, 55)
    recorder.end_step()
    [times] = recorder.steps
    assert times.compute == 3 + 9 + 1 + 9
    assert times.send == 4 + 5  # of the two backwards; the forwards send nothing
    assert times.flush == 7 + 3
    assert times.waits == {(0, NUM_ROWS): 5, (0, ACTIVATIONS): 7 + 6}
    assert times.actions == 4


def test_nothing_is_kept_when_tracing_is_off():
    recorder = Recorder()
    add_step(recorder, (0, 7, 10, 11))
    with recorder.span("mine"):
        pass
    recorder.add_wait(LOSS, 0, 1, 2)
    assert not recorder.traced and not recorder.outside
    recorder.tracing = True
    with recorder.span("mine"):
        pass
    assert [note.name for note in recorder.outside] == ["mine"]


def test_what_comes_between_steps_is_not_of_the_step_before():
    recorder = Recorder(tracing=True)
    add_step(recorder, (0, 7, 10, 11))
    recorder.add_wait(LOSS, 0, 1, 2)  # `evaluate` shares a loss as well
    recorder.add_wait("the parameters' hash", 0, 1, 2)
    assert recorder.traced[0].notes == []
    assert recorder.steps[0].waits == {(0, ACTIVATIONS): 7}


def test_what_comes_between_steps_does_not_pile_up():
    """A rank that traces and then answers for hours: each forward waits for a number of rows."""

    def forwards(recorder, count):
        tracemalloc.start()
        try:
            for _ in range(count):
                recorder.add_wait(NUM_ROWS, 0, 1, 2)
                recorder.add_flush("waiting for its sends", 1, 2)
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    recorder = Recorder(tracing=True)
    assert forwards(recorder, 1000) < 10_000
    add_step(recorder, (0, 7, 10, 11))
    assert forwards(recorder, 1000) < 10_000


# -- a real run -----------------------------------------------------------------------------------


def train(world, schedule, path, num_steps=3, tracing=True):
    """Train a little; one optimizer is made before tracing begins, one is for something else."""
    pipe = barepp.Pipeline(
        world, barepp.mlp(7, 16), nn.functional.cross_entropy, schedule=schedule, num_microbatches=5
    )
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    elsewhere = torch.optim.Adam([nn.Parameter(torch.ones(1))])
    if tracing:
        pipe.trace()
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        images = torch.randn(10, 64, generator=generator)
        pipe.zero_grad()
        pipe.step(images, torch.randint(0, 10, (10,), generator=generator))
        optimizer.step()
        elsewhere.step()
        with pipe.recorder.span("my own"):
            pass
    summary = barepp.summarise(world, pipe.recorder, pipe.peak_in_flight)
    if tracing:
        barepp.write_trace(world, pipe.recorder, path)
    return summary, pipe.parameters_sha256(), pipe.schedule.order


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zb_v"])
def test_a_trace_is_the_schedule_one_for_one(schedule, tmp_path):
    path = tmp_path / "trace.json"
    (_, digest, order), *_ = run(train, 4, schedule, path)
    check_format(json.loads(path.read_text()))
    trace = read_trace(path)
    assert trace.schedule.name == schedule
    for rank, recorded in enumerate(trace.ranks):
        assert [step.number for step in recorded.steps] == [0, 1, 2]
        for step in recorded.steps:
            mine = [span for span in recorded.actions if span.step == step.number]
            assert [span.action for span in mine] == list(order[rank])
            for span in mine:
                assert step.start <= span.asked <= span.start < span.end <= span.gave <= step.end
        flushes = [note for note in recorded.notes if note.name == "waiting for its sends"]
        assert [note.step for note in flushes] == [0, 1, 2]
        assert all(note.start < note.end for note in flushes)
        outside = [note.name for note in recorded.notes if note.step is None]
        assert outside == ["optimizer (SGD)", "my own"] * 3
    program = lower(order, trace.schedule.num_stages)
    crossing = sum(step.receive_from is not None for row in program for step in row)
    arrows = list(messages(trace))
    assert len(arrows) == 3 * crossing
    for _, sent, _, used in arrows:  # over inproc isend itself delivers, so within its call
        assert sent.end <= used.arrived <= used.start
    assert transfers(trace).messages == 2 * crossing
    [(_, plain, _)] = run(train, 1, "1f1b", path, 3, False)
    assert digest == plain  # to the bit


def test_the_summary_and_the_trace_agree(tmp_path):
    """The sums are taken while it runs, the trace is read afterwards: two ways to one number."""
    path = tmp_path / "trace.json"
    (summary, _, _), *_ = run(train, 3, "gpipe", path, 4)
    for one, other in zip(summary.ranks, rank_times(read_trace(path)), strict=True):
        for name in (
            "step_ms",
            "computing_ms",
            "sending_ms",
            "flushing_ms",
            "own_ms",
            "waiting_ms",
        ):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-3), name
        assert {wait[:2] for wait in one.waits_ms} == {wait[:2] for wait in other.waits_ms}
        assert (one.actions, one.peak_in_flight) == (other.actions, other.peak_in_flight)
    reasons = {wait[:2] for wait in summary.ranks[1].waits_ms}
    assert reasons == {(0, ACTIVATIONS), (2, GRADIENTS), (0, NUM_ROWS), (2, LOSS)}
    parts = ("computing_ms", "communicating_ms", "waiting_ms", "own_ms")
    for times in summary.ranks:
        assert sum(getattr(times, part) for part in parts) == pytest.approx(times.step_ms)
        assert all(getattr(times, part) >= 0 for part in parts)
        assert times.peak_memory_nbytes > 50 << 20  # torch alone is more


def test_a_trace_of_nothing_is_declined(tmp_path):
    with pytest.raises(UsageError, match=r"no step was traced: call Pipeline.trace\(\) before"):
        barepp.write_trace(alone(), Recorder(tracing=True), tmp_path / "trace.json")


def test_times_are_put_on_rank_0s_clock(tmp_path, monkeypatch):
    """Rank 1's clock is said to be an hour ahead: its spans move back by that."""
    hour = 3600 * 10**9

    def compared(transport):
        return [Reading(0, 0, 0), Reading(0, hour, 700)] if transport.rank == 0 else []

    def work(world):
        recorder = Recorder(tracing=True)
        monkeypatch.setattr(barepp.trace.collect, "compare_clocks", compared)
        ahead = hour * world.rank
        recorder.schedule = barepp.Schedule("by hand", 2, 2, 2, ORDER)
        recorder.begin_step()
        program = lower(ORDER, 2)[world.rank]
        recorder.add_actions(
            program,
            [(ahead + t, ahead + t, ahead + t + 5, ahead + t + 5) for t in range(0, 40, 10)],
        )
        recorder.end_step()
        barepp.write_trace(world, recorder, tmp_path / "trace.json")

    run(work, 2)
    trace = read_trace(tmp_path / "trace.json")
    assert [[span.start for span in rank.actions] for rank in trace.ranks] == [[0, 10, 20, 30]] * 2
    assert trace.clock_error_ns == [0, 700]
    assert trace.ranks[1].actions[0].action == Action(1, Kind.F, 0)


def test_hooks_go_with_the_recorder():
    before = len(torch_optimizer._global_optimizer_post_hooks)
    pipe = barepp.Pipeline(alone(), barepp.mlp(3, 8), nn.functional.cross_entropy)
    pipe.trace()
    pipe.trace()  # one hook, one clock more
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    del pipe
    gc.collect()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before
