"""Measured bubbles beside predicted ones: each schedule with stages that sleep, not compute.

    python -m barepp.bench bubbles [--json PATH]

A layer sleeps for its forward, its input's gradient and its weights' gradient, equally long. So
every cost is known, and more ranks than cores are no matter: what is measured is the schedule, the
executor and the transport. The schedules take turns, round by round, on the same ranks, and a step
that computed another gradient ends the benchmark. A rank sleeps `--forward-ms` for each microbatch
forwards, whether it holds one stage or two. All ranks begin a step together, as in the prediction.

    step ms      median, and quartiles
    x predicted  measured / predicted step time: what a sleep lasts longer than it should, messages,
                 and everything else
    bubble       1 - computing / (ranks * step time), the median of the rounds
    off          measured - predicted bubble

At the end stand the two bounds that this project holds itself to, and whether they were met: every
bubble within 0.02 of the predicted one; and step times in the order of the predicted ones (zb_v,
zb_h1, interleaved_1f1b, 1f1b and gpipe, naive), with 1f1b and gpipe within 3 % of each other.

With `--heavy N` one layer of many sleeps N times as long. Then each schedule trains with a uniform
and with a balanced partition, which the ranks find by measuring, and instead of the bounds stands
how much of the uniform step's time the balanced one takes, measured and predicted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

from barepp.bench.case import Case
from barepp.bench.figures import spread, table
from barepp.bench.teams.conductor import Answers, Conductor, Team, step_times
from barepp.bench.training import check_same_gradients
from barepp.errors import UsageError
from barepp.plan.simulate import Costs, simulate
from barepp.schedules import make_schedule, schedule_names, usual_stages

BOUND: Final = 0.02  # of the measured bubble, beside the predicted one
ALIKE: Final = 0.03  # of the step times that are predicted to be the same
LAYERS_PER_RANK: Final = 2  # so that every schedule cuts the same layers
LAYERS_TO_SHIFT: Final = 4  # a rank's, where one is heavy

Entry = tuple[str, str]  # schedule, partition
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--ranks", type=int, default=4, help="(4)")
    parser.add_argument("--microbatches", type=int, default=8, help="(8)")
    parser.add_argument(
        "--forward-ms", type=float, default=40.0, help="a rank's forward of a microbatch (40)"
    )
    parser.add_argument(
        "--heavy", type=float, default=1.0, help="one layer sleeps so many times as long (1)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each schedule (5)")
    parser.add_argument("--steps", type=int, default=2, help="in a turn, after one to warm up (2)")
    parser.add_argument("--schedules", default=",".join(schedule_names()), help="commas between")
    parser.add_argument("--transport", default="auto", help="barepp's (auto)")


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Let the schedules take turns; show the table, and whether the bounds were met."""
    names = arguments.schedules.split(",")
    if min(arguments.ranks, arguments.microbatches, arguments.rounds, arguments.steps) < 1:
        raise UsageError("--ranks, --microbatches, --rounds and --steps start at 1")
    if not 0 < arguments.forward_ms < math.inf or not 1 <= arguments.heavy < math.inf:
        raise UsageError(
            f"--forward-ms {arguments.forward_ms:g} --heavy {arguments.heavy:g}: the first has to "
            "be above 0, the second at least 1"
        )
    heavy = arguments.heavy > 1
    layers_per_rank = LAYERS_TO_SHIFT if heavy else LAYERS_PER_RANK
    case = Case(
        layers=layers_per_rank * arguments.ranks,
        hidden=16,
        batch=arguments.microbatches,
        microbatches=arguments.microbatches,
        sleep_s=arguments.forward_ms / 1e3 / layers_per_rank,
        heavy=arguments.heavy,
    )
    for name in names:  # what cannot run is found before anything is started
        make_schedule(name, usual_stages(name, arguments.ranks), 1, arguments.ranks)
    entries = list(itertools.product(names, ("uniform", "balanced") if heavy else ("uniform",)))
    with Conductor() as conductor:
        team = conductor.start_barepp(arguments.ranks, "--transport", arguments.transport)
        conductor.gather()
        team.call("build", case)
        turns = _take_turns(team, entries, arguments.rounds, arguments.steps)
    rows = [_row(entry, case, turns[entry]) for entry in entries]
    for line in table([_line(row, heavy) for row in rows]):
        show(line)
    results = {"case": dataclasses.asdict(case), "ranks": arguments.ranks, "rows": rows}
    if heavy:
        return {**results, "gains": _gains(rows, show)}
    met = bounds(rows)
    for bound, holds in met.items():
        show(f"{'met    ' if holds else 'NOT met'} {bound}")
    return {**results, "met": met}


def predict(name: str, ranks: int, case: Case, sizes: Sequence[int]) -> tuple[float, float]:
    """Return the makespan in ms and the bubble of stages of so many layers."""
    layers = iter(case.sleeps_s())
    costs_ms = [1e3 * math.fsum(itertools.islice(layers, size)) for size in sizes]
    order = make_schedule(name, len(sizes), case.microbatches, ranks).order
    timeline = simulate(order, len(sizes), Costs(costs_ms, costs_ms, costs_ms))
    return float(timeline.makespan), timeline.bubble


def _take_turns(
    team: Team, entries: Sequence[Entry], rounds: int, steps: int
) -> dict[Entry, list[Answers]]:
    """Return for each entry the answers of its ranks, round by round."""

    def turn(entry: Entry, steps: int) -> Answers:
        return team.train(entry[0], steps, partition=entry[1])

    check_same_gradients({entry: turn(entry, 1) for entry in entries})
    turns: dict[Entry, list[Answers]] = {entry: [] for entry in entries}
    for _ in range(rounds):
        for entry in entries:
            turns[entry].append(turn(entry, steps))
    return turns


def _row(entry: Entry, case: Case, turns: list[Answers]) -> Row:
    sizes = turns[0][0]["partition"]
    makespan_ms, bubble = predict(entry[0], len(turns[0]), case, sizes)
    step_ms = spread([1e3 * step_s for turn in turns for step_s in step_times(turn)])
    return {
        "schedule": entry[0],
        "partition": sizes,
        "step_ms": step_ms,
        "predicted_ms": makespan_ms,
        "bubble": statistics.median(turn[0]["bubble"] for turn in turns),
        "bubble_predicted": bubble,
    }


def _line(row: Row, with_partition: bool) -> dict[str, str]:
    step, predicted = row["step_ms"], row["predicted_ms"]
    partition = {"partition": ",".join(map(str, row["partition"]))} if with_partition else {}
    return {
        "schedule": row["schedule"],
        **partition,
        "step ms": f"{step['median']:.1f}",
        "[quartiles]": f"[{step['low']:.1f} {step['high']:.1f}]",
        "predicted": f"{predicted:.1f}",
        "x predicted": f"{step['median'] / predicted:.3f}",
        "bubble": f"{row['bubble']:.3f}",
        "predicted ": f"{row['bubble_predicted']:.3f}",
        "off": f"{row['bubble'] - row['bubble_predicted']:+.3f}",
    }


def _gains(rows: Sequence[Row], show: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Show, for each schedule, the balanced step's part of the uniform one's."""
    gains = {}
    for uniform, balanced in zip(rows[::2], rows[1::2], strict=True):
        measured = balanced["step_ms"]["median"] / uniform["step_ms"]["median"]
        predicted = balanced["predicted_ms"] / uniform["predicted_ms"]
        gains[uniform["schedule"]] = {"measured": measured, "predicted": predicted}
        show(
            f"{uniform['schedule']}: balanced takes {measured:.3f} of the uniform step's time, "
            f"{predicted:.3f} predicted"
        )
    return gains


def bounds(rows: Sequence[Row]) -> dict[str, bool]:
    """Return the bounds in words, and whether these rows meet them."""
    off = max(abs(row["bubble"] - row["bubble_predicted"]) for row in rows)
    met = {f"every bubble within {BOUND} of the predicted one (furthest: {off:.3f})": off <= BOUND}
    ordered = sorted(rows, key=lambda row: row["predicted_ms"])
    for one, other in itertools.pairwise(ordered):
        first, second = one["step_ms"]["median"], other["step_ms"]["median"]
        names = one["schedule"], other["schedule"]
        if math.isclose(one["predicted_ms"], other["predicted_ms"]):
            apart = abs(first - second) / min(first, second)
            met[f"{names[0]} = {names[1]} (apart: {apart:.1%} of 3 %)"] = apart <= ALIKE
        else:
            met[f"{names[0]} < {names[1]} in step time"] = first < second
    return met
