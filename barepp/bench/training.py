"""Step time of barepp's schedules beside torch.distributed.pipelining, one process, and the ideal.

    python -m barepp.bench [--against torch] [--json PATH]

All processes of a world size live at once and take turns, round by round; those whose turn it is
not are blocked. Everybody trains the same layers on the same microbatches, with one thread a
process and no optimizer; a step that computed another gradient ends the benchmark.

    x torch      barepp's step time / torch's for the same schedule, paired within a round
    x alone      step time / that of one process which accumulates the same microbatches
    ideal        what the simulator says for the measured costs of each stage's forward and
                 backward, transfers free; with fewer cores than ranks, at least all work / cores
    bubble       1 - computing / (ranks * step time)
    comp, wait, move   ms a step and rank: in torch's arithmetic, blocked on a message, the rest
    us/act       that rest for each action: barepp's own time. (With more ranks than cores it holds
                 time for a core as well: a message wakes its receiver, which takes ours.)
    CPU ms       processor time of all ranks in a step
    +us/act      processor time beyond that of one process in plain torch, for each action: all
                 that cutting, moving and ordering cost, on every thread
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from barepp.bench.case import LARGE, MICROPP, MIDDLE, Case
from barepp.bench.figures import medians, ratio, spread, table
from barepp.bench.teams.conductor import Answers, BenchError, Conductor, Team, step_times
from barepp.errors import UsageError
from barepp.plan.simulate import Costs, simulate
from barepp.program.actions import Order
from barepp.schedules import make_schedule

SIZES: Final = {"128": MICROPP, "512": MIDDLE, "1024": LARGE}
THEIR_SCHEDULES: Final = ("gpipe", "1f1b")
TURN_S: Final = 0.3  # what one turn should last, 3 to 50 steps
TOLERANCE: Final = 1e-3  # of the gradient's square: float32, summed in another order

Entry = tuple[str, str]  # who takes a turn: team and schedule
ALONE: Final[Entry] = ("alone", "one process")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--against", choices=["torch", "none"], default="torch", help="whom to run beside"
    )
    widths = ", ".join(f"{size} (batch {case.batch})" for size, case in SIZES.items())
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"the layers' widths: {widths}")
    parser.add_argument("--ranks", default="2,4", help="world sizes, with commas between")
    parser.add_argument(
        "--schedules", default="naive,gpipe,1f1b", help="with commas between (naive,gpipe,1f1b)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (7)")
    parser.add_argument("--steps", type=int, default=0, help="in a turn (as many as 0.3 s hold)")
    parser.add_argument("--transport", default="auto", help="barepp's (auto)")


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Measure every size on every number of ranks."""
    sizes, schedules = arguments.sizes.split(","), arguments.schedules.split(",")
    for size in sizes:
        if size not in SIZES:
            raise UsageError(f"there is no size {size!r}; there are {', '.join(SIZES)}")
    try:
        ranks = [int(number) for number in arguments.ranks.split(",")]
    except ValueError:
        raise UsageError(f"--ranks is numbers with commas between, not {arguments.ranks}") from None
    if min(ranks) < 2 or arguments.rounds < 1 or arguments.steps < 0:
        raise UsageError("--ranks start at 2, --rounds at 1, --steps at 0")
    for world_size in ranks:
        for schedule in schedules:
            make_schedule(schedule, world_size, MICROPP.microbatches, world_size)
    results = []
    for world_size in ranks:
        with Conductor() as conductor:
            teams = {
                "alone": conductor.start_alone(),
                "barepp": conductor.start_barepp(world_size, "--transport", arguments.transport),
            }
            if arguments.against == "torch":
                teams["torch"] = conductor.start_torch(world_size)
            conductor.gather()
            for size in sizes:
                entries = _entries(teams, schedules)
                measured = _measure(SIZES[size], teams, entries, arguments.rounds, arguments.steps)
                results.append(measured)
                for line in _report(measured):
                    show(line)
    return {"results": results}


def _entries(teams: Mapping[str, Team], schedules: Sequence[str]) -> list[Entry]:
    """Return who takes a turn, in this order."""
    pairs = [(team, schedule) for schedule in schedules for team in ("barepp", "torch")]
    return [ALONE] + [
        (team, schedule)
        for team, schedule in pairs
        if team in teams and (team == "barepp" or schedule in THEIR_SCHEDULES)
    ]


def _measure(
    case: Case, teams: Mapping[str, Team], entries: Sequence[Entry], rounds: int, steps: int
) -> dict[str, Any]:
    """Let all entries take turns at one case; return its figures."""
    for each in teams.values():
        each.call("build", case)
    first = {(team, schedule): teams[team].train(schedule, 2) for team, schedule in entries}
    check_same_gradients(first)
    counts = {entry: steps or _steps_for(answers) for entry, answers in first.items()}
    turns: dict[Entry, list[Answers]] = {entry: [] for entry in entries}
    costs_s: dict[str, list[list[float]]] = {"forward": [], "backward": []}
    stages = teams["barepp"].size
    for _ in range(rounds):
        for team, schedule in entries:
            turns[team, schedule].append(teams[team].train(schedule, counts[team, schedule]))
        [costs] = teams["alone"].call("costs", stages, 1 + counts[ALONE])
        for kind, rows in costs.items():
            costs_s[kind] += rows[1:]
    return _figures(case, stages, turns, *map(medians, costs_s.values()))


def check_same_gradients(first: Mapping[Entry, Answers]) -> None:
    """Raise `BenchError` unless all have computed the same gradient."""
    squares = {
        entry: sum(answer["gradient_square"] for answer in answers)
        for entry, answers in first.items()
    }
    [(reference, expected), *others] = squares.items()
    for entry, square in others:
        if not abs(square - expected) <= TOLERANCE * expected:
            raise BenchError(
                f"{' '.join(entry)} computed a gradient whose square is {square:.6g}, "
                f"{' '.join(reference)} one of {expected:.6g}: these times cannot be compared"
            )


def _steps_for(answers: Answers) -> int:
    return max(3, min(50, round(TURN_S / statistics.median(step_times(answers)))))


def _figures(
    case: Case,
    world_size: int,
    turns: Mapping[Entry, list[Answers]],
    forward_s: list[float],
    backward_s: list[float],
) -> dict[str, Any]:
    """Put the figures of one case together; the last two are what an action of each stage costs."""
    times = {entry: [step_times(answers) for answers in rounds] for entry, rounds in turns.items()}
    cpu_ms = {entry: [_cpu_ms(answers) for answers in rounds] for entry, rounds in turns.items()}
    rows = []
    for (team, schedule), rounds in turns.items():
        mine, used_ms = times[team, schedule], spread(cpu_ms[team, schedule])
        step_ms = spread([1e3 * step_s for step_s in chain.from_iterable(mine)])
        row: dict[str, Any] = {
            "team": team,
            "schedule": schedule,
            "step_ms": step_ms,
            "times_alone": ratio(mine, times[ALONE]),
            "cpu_ms": used_ms,
        }
        if (team, schedule) != ALONE:
            order = make_schedule(schedule, world_size, case.microbatches, world_size).order
            row |= _ideal(step_ms["median"], order, forward_s, backward_s)
            added_ms = used_ms["median"] - statistics.median(cpu_ms[ALONE])
            row["added_us_per_action"] = 1e3 * added_ms / sum(map(len, order))
        if team == "barepp":
            row |= _inside(rounds, order)
            if ("torch", schedule) in times:
                row["times_torch"] = ratio(mine, times["torch", schedule])
        rows.append(row)
    return {
        "case": dataclasses.asdict(case),
        "ranks": world_size,
        "rounds": len(times[ALONE]),
        "costs_ms": {
            "forward": [1e3 * cost for cost in forward_s],
            "backward": [1e3 * cost for cost in backward_s],
        },
        "rows": rows,
    }


def _cpu_ms(answers: Answers) -> float:
    used_s: float = sum(answer["cpu_s"] for answer in answers)
    return 1e3 * used_s / len(answers[0]["ends"])


def _ideal(
    step_ms: float, order: Order, forward_s: list[float], backward_s: list[float]
) -> dict[str, Any]:
    halves = [cost / 2 for cost in backward_s]  # a full backward takes both
    costs = Costs(forward=forward_s, backward_input=halves, backward_weight=halves)
    timeline = simulate(order, len(forward_s), costs)
    shared_s = float(timeline.busy) / len(os.sched_getaffinity(0))
    ideal_ms = 1e3 * max(float(timeline.makespan), shared_s)
    return {
        "ideal_ms": ideal_ms,
        "times_ideal": step_ms / ideal_ms,
        "makespan_ms": 1e3 * float(timeline.makespan),
        "bubble_ideal": timeline.bubble,
    }


def _inside(rounds: list[Answers], order: Order) -> dict[str, Any]:
    """Return where barepp's step time goes, for each rank: medians over the rounds."""
    summaries = [answers[0] for answers in rounds]
    inside: dict[str, Any] = {"bubble": statistics.median(s["bubble"] for s in summaries)}
    for part in ("computing_ms", "waiting_ms", "moving_ms"):
        inside[part] = medians([summary[part] for summary in summaries])
    inside["own_us_per_action"] = [
        1e3 * moving / len(actions)
        for moving, actions in zip(inside["moving_ms"], order, strict=True)
    ]
    return inside


def _report(measured: dict[str, Any]) -> list[str]:
    """Return the table for a person."""
    case, ranks = Case(**measured["case"]), measured["ranks"]
    return ["", f"{case}, {ranks} ranks", *table([_line(row) for row in measured["rows"]])]


def _line(row: dict[str, Any]) -> dict[str, str]:
    step = row["step_ms"]
    alone = (row["team"], row["schedule"]) == ALONE
    line = {
        "": row["schedule"] if alone else f"{row['schedule']} {row['team']}",
        "step ms": f"{step['median']:.2f}",
        "[quartiles]": f"[{step['low']:.2f} {step['high']:.2f}]",
        "x torch": f"{row['times_torch']['median']:.2f}" if "times_torch" in row else "",
        "x alone": f"{row['times_alone']['median']:.2f}",
        "ideal ms": "" if alone else f"{row['ideal_ms']:.2f}",
        "x ideal": "" if alone else f"{row['times_ideal']:.2f}",
        "CPU ms": f"{row['cpu_ms']['median']:.2f}",
        "+us/act": "" if alone else f"{row['added_us_per_action']:.0f}",
    }
    if row["team"] == "barepp":
        line["bubble"] = f"{row['bubble']:.0%}"
        for title, part in (("comp", "computing"), ("wait", "waiting"), ("move", "moving")):
            line[title] = f"{statistics.mean(row[f'{part}_ms']):.2f}"
        line["us/act"] = f"{statistics.mean(row['own_us_per_action']):.0f}"
    return line
