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
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

from barepp.bench.case import Case
from barepp.bench.figures import flat, spread, table
from barepp.bench.teams import Conductor, Team, step_times
from barepp.bench.training import check_same_gradients
from barepp.errors import UsageError
from barepp.schedules import make_schedule, schedule_names, usual_stages
from barepp.simulate import Costs, simulate

BOUND: Final = 0.02  # of the measured bubble, beside the predicted one
ALIKE: Final = 0.03  # of the step times that are predicted to be the same
LAYERS_PER_RANK: Final = 2  # so that every schedule cuts the same layers

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--ranks", type=int, default=4, help="(4)")
    parser.add_argument("--microbatches", type=int, default=8, help="(8)")
    parser.add_argument(
        "--forward-ms", type=float, default=40.0, help="a rank's forward of a microbatch (40)"
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
    if not 0 < arguments.forward_ms < float("inf"):
        raise UsageError(f"--forward-ms is {arguments.forward_ms:g}; it must be above 0")
    case = Case(
        layers=LAYERS_PER_RANK * arguments.ranks,
        hidden=16,
        batch=arguments.microbatches,
        microbatches=arguments.microbatches,
        sleep_s=arguments.forward_ms / 1e3 / LAYERS_PER_RANK,
    )
    predicted = {name: predict(name, arguments.ranks, case) for name in names}
    with Conductor() as conductor:
        team = conductor.start_barepp(arguments.ranks, "--transport", arguments.transport)
        conductor.gather()
        team.build(case)
        turns = _take_turns(team, names, arguments.rounds, arguments.steps)
    rows = [_row(name, *predicted[name], turns[name]) for name in names]
    for line in table([_line(row) for row in rows]):
        show(line)
    met = bounds(rows)
    for bound, holds in met.items():
        show(f"{'met    ' if holds else 'NOT met'} {bound}")
    return {"case": case.to_record(), "ranks": arguments.ranks, "rows": rows, "met": met}


def predict(name: str, ranks: int, case: Case) -> tuple[float, float]:
    """Return the makespan in ms and the bubble."""
    stages = usual_stages(name, ranks)
    order = make_schedule(name, stages, case.microbatches, ranks).order
    cost = 1e3 * case.sleep_s * case.layers / stages
    timeline = simulate(order, stages, Costs(cost, cost, cost))
    return float(timeline.makespan), timeline.bubble


def _take_turns(
    team: Team, names: Sequence[str], rounds: int, steps: int
) -> dict[str, list[list[dict[str, Any]]]]:
    """Return for each schedule the answers of its ranks, round by round."""
    check_same_gradients({("barepp", name): team.train(name, 1) for name in names})
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            turns[name].append(team.train(name, steps))
    return turns


def _row(name: str, makespan_ms: float, bubble: float, turns: list[list[dict[str, Any]]]) -> Row:
    step_ms = spread([1e3 * second for second in flat([step_times(turn) for turn in turns])])
    measured = statistics.median(turn[0]["bubble"] for turn in turns)
    return {
        "schedule": name,
        "step_ms": step_ms.to_record(),
        "predicted_ms": makespan_ms,
        "bubble": measured,
        "bubble_predicted": bubble,
    }


def _line(row: Row) -> dict[str, str]:
    step, predicted = row["step_ms"], row["predicted_ms"]
    return {
        "schedule": row["schedule"],
        "step ms": f"{step['median']:.1f}",
        "[quartiles]": f"[{step['low']:.1f} {step['high']:.1f}]",
        "predicted": f"{predicted:.1f}",
        "x predicted": f"{step['median'] / predicted:.3f}",
        "bubble": f"{row['bubble']:.3f}",
        "predicted ": f"{row['bubble_predicted']:.3f}",
        "off": f"{row['bubble'] - row['bubble_predicted']:+.3f}",
    }


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
