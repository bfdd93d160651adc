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
import statistics
from collections.abc import Callable
from typing import Any, Final

from barepp.bench.case import LARGE, MICROPP, MIDDLE, Case
from barepp.bench.figures import medians
from barepp.bench.teams import BenchError, Conductor, Team, step_times
from barepp.bench.training_report import ALONE, ONE_PROCESS, Answers, Turns, figures, report
from barepp.errors import UsageError
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
