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
from collections.abc import Callable
from typing import Any, Final

from barepp.bench.case import LARGE, MICROPP, MIDDLE, Case
from barepp.bench.figures import flat, medians, ratio, spread, table
from barepp.bench.teams.conductor import BenchError, Conductor, Team, step_times
from barepp.errors import UsageError
from barepp.plan.simulate import Costs, simulate
from barepp.program.actions import Order
from barepp.schedules import make_schedule

SIZES: Final = {"128": MICROPP, "512": MIDDLE, "1024": LARGE}
THEIR_SCHEDULES: Final = ("gpipe", "1f1b")
TURN_S: Final = 0.3  # what one turn should last, 3 to 50 steps
TOLERANCE: Final = 1e-3  # of the gradient's square: float32, summed in another order


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
    sizes = arguments.sizes.split(",")
    for size in sizes:
        if size not in SIZES:
            raise UsageError(f"there is no size {size!r}; there are {', '.join(SIZES)}")
    try:
        ranks = [int(number) for number in arguments.ranks.split(",")]
    except ValueError:
        raise UsageError(f"--ranks is numbers with commas between, not {arguments.ranks}") from None
    if min(ranks) < 2 or arguments.rounds < 1 or arguments.steps < 0:
        raise UsageError("--ranks start at 2, --rounds at 1, --steps at 0")
    plan = Plan(
        tuple(arguments.schedules.split(",")),
        arguments.against == "torch",
        arguments.rounds,
        arguments.steps,
    )
    for world_size in ranks:
        for schedule in plan.schedules:
            make_schedule(schedule, world_size, MICROPP.microbatches, world_size)
    results = []
    for world_size in ranks:
        with Conductor() as conductor:
            teams = Teams(
                conductor.start_barepp(world_size, "--transport", arguments.transport),
                conductor.start_torch(world_size) if plan.against_torch else None,
                conductor.start_alone(),
            )
            conductor.gather()
            for size in sizes:
                measured = measure(SIZES[size], world_size, teams, plan)
                results.append(measured)
                for line in report(measured):
                    show(line)
    return {"results": results}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be measured, and how often."""

    schedules: tuple[str, ...]
    against_torch: bool
    rounds: int
    steps: int  # in a turn; 0 for as many as fill it

    def entries(self) -> list[tuple[str, str]]:
        """Return (team, schedule), in the order in which they take turns."""
        entries = [(ALONE, ONE_PROCESS)]
        for schedule in self.schedules:
            entries.append(("barepp", schedule))
            if self.against_torch and schedule in THEIR_SCHEDULES:
                entries.append(("torch", schedule))
        return entries


@dataclasses.dataclass(frozen=True)
class Teams:
    """Who takes turns."""

    barepp: Team
    torch: Team | None
    alone: Team

    def named(self, name: str) -> Team:
        """Return one by the name of its attribute."""
        team: Team = getattr(self, name)
        return team


def measure(case: Case, world_size: int, teams: Teams, plan: Plan) -> dict[str, Any]:
    """Let everybody take turns at one case; return its figures."""
    for team in (teams.barepp, teams.torch, teams.alone):
        if team is not None:
            team.build(case)
    entries = plan.entries()
    first = {entry: teams.named(entry[0]).train(entry[1], 2) for entry in entries}
    check_same_gradients(first)
    steps = {entry: plan.steps or _steps_for(first[entry]) for entry in entries}
    turns: Turns = {entry: [] for entry in entries}
    forward, backward = [], []
    for _ in range(plan.rounds):
        for entry in entries:
            turns[entry].append(teams.named(entry[0]).train(entry[1], steps[entry]))
        order = {"order": "costs", "stages": world_size, "steps": 1 + steps[entries[0]]}
        [costs] = teams.alone.ask(order)
        forward += costs["forward_s"][1:]
        backward += costs["backward_s"][1:]
    return figures(case, world_size, turns, medians(forward), medians(backward))


def check_same_gradients(first: dict[tuple[str, str], Answers]) -> None:
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


# The figures of one case of `training`, from everybody's turns; and the table for a person.

ALONE: Final = "alone"  # the team of one process, and its only way to train
ONE_PROCESS: Final = "one process"

Answers = list[dict[str, Any]]  # of one turn, by rank
Turns = dict[tuple[str, str], list[Answers]]  # (team, schedule): round by round


def figures(
    case: Case, world_size: int, turns: Turns, forward_s: list[float], backward_s: list[float]
) -> dict[str, Any]:
    """Put the figures of one case together; the last two are what an action of each stage costs."""
    times = {entry: [step_times(answers) for answers in rounds] for entry, rounds in turns.items()}
    alone = times[ALONE, ONE_PROCESS]
    alone_cpu_ms = [_cpu_ms(answers) for answers in turns[ALONE, ONE_PROCESS]]
    rows = []
    for (team, schedule), rounds in turns.items():
        mine = times[team, schedule]
        row: dict[str, Any] = {
            "team": team,
            "schedule": schedule,
            "step_ms": spread([1e3 * value for value in flat(mine)]).to_record(),
            "times_alone": ratio(mine, alone).to_record(),
            "cpu_ms": spread([_cpu_ms(answers) for answers in rounds]).to_record(),
        }
        if team != ALONE:
            order = make_schedule(schedule, world_size, case.microbatches, world_size).order
            row |= _ideal(row["step_ms"]["median"], order, forward_s, backward_s)
            added_ms = row["cpu_ms"]["median"] - statistics.median(alone_cpu_ms)
            row["added_us_per_action"] = 1e3 * added_ms / sum(map(len, order))
        if team == "barepp":
            row |= _inside(rounds, order)
            if ("torch", schedule) in times:
                row["times_torch"] = ratio(mine, times["torch", schedule]).to_record()
        rows.append(row)
    return {
        "case": case.to_record(),
        "ranks": world_size,
        "rounds": len(alone),
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


def report(measured: dict[str, Any]) -> list[str]:
    """Return the table for a person."""
    case, ranks = Case(**measured["case"]), measured["ranks"]
    lines = [_line(row) for row in measured["rows"]]
    return ["", f"{case}, {ranks} ranks", *table(lines)]


def _line(row: dict[str, Any]) -> dict[str, str]:
    step = row["step_ms"]
    line = {
        "": row["schedule"] if row["team"] == ALONE else f"{row['schedule']} {row['team']}",
        "step ms": f"{step['median']:.2f}",
        "[quartiles]": f"[{step['low']:.2f} {step['high']:.2f}]",
        "x torch": f"{row['times_torch']['median']:.2f}" if "times_torch" in row else "",
        "x alone": f"{row['times_alone']['median']:.2f}",
        "ideal ms": f"{row['ideal_ms']:.2f}" if "ideal_ms" in row else "",
        "x ideal": f"{row['times_ideal']:.2f}" if "times_ideal" in row else "",
        "CPU ms": f"{row['cpu_ms']['median']:.2f}",
        "+us/act": f"{row['added_us_per_action']:.0f}" if "added_us_per_action" in row else "",
    }
    if "bubble" in row:
        parts = (row["computing_ms"], row["waiting_ms"], row["moving_ms"])
        line |= {
            "bubble": f"{row['bubble']:.0%}",
            "comp": f"{statistics.mean(parts[0]):.2f}",
            "wait": f"{statistics.mean(parts[1]):.2f}",
            "move": f"{statistics.mean(parts[2]):.2f}",
            "us/act": f"{statistics.mean(row['own_us_per_action']):.0f}",
        }
    return line
