"""How the cost grows with the work: microbatches, ranks, bytes, processes.

    python -m barepp.bench growth [--json PATH]

Five series, each over one size. Sizes of a training series take turns, round by round; all their
processes live at once, and those whose turn it is not are blocked. Under each table stands what was
fitted: cost = fixed + each * size, and size ** exponent over the larger half of the sizes. Nothing
should grow faster than its size: the exponent of a cost that is linear is 1.

    microbatches   step and processor time of 2 ranks, and for each microbatch; all have 4 rows
    ranks          processor time of a step, and of each action; the same batch over more ranks
    bytes          step time of 2 ranks; larger activations, layers that hardly compute
    rendezvous     attach, join and barrier of bare processes without torch
    launch         from the command to the first barrier, with `python -m barepp.launch`
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

from barepp.bench.case import Case
from barepp.bench.figures import growth, spread, table
from barepp.bench.start import launch_barepp
from barepp.bench.teams.conductor import BenchError, Conductor, Team, environment, step_times
from barepp.errors import UsageError

ROWS: Final = 4  # of a microbatch
TURN_S: Final = 0.2
LIMIT_S: Final = 300.0
SERIES: Final = {  # name: (default sizes, what a size is)
    "microbatches": ("1,2,4,8,16,32,64,128,256", "microbatches of a step"),
    "ranks": ("1,2,4,8,16", "ranks"),
    "bytes": ("4096,65536,262144,1048576,4194304,16777216", "bytes of an activation"),
    "rendezvous": ("1,2,4,8,16,32,64", "bare processes"),
    "launch": ("1,2,4,8,16", "ranks"),
}

Show = Callable[[str], None]
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    for name, (sizes, what) in SERIES.items():
        parser.add_argument(
            f"--{name}", default=sizes, metavar="SIZES", help=f"{what} ({sizes}); none to leave out"
        )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each size (5)")
    parser.add_argument("--transport", default="auto", help="barepp's (auto)")


def run(arguments: argparse.Namespace, show: Show) -> dict[str, Any]:
    """Measure every series that is asked for."""
    sizes = {name: _sizes(name, getattr(arguments, name)) for name in SERIES}
    if arguments.rounds < 1:
        raise UsageError("--rounds starts at 1")
    results: dict[str, Any] = {}
    for name, measure in (
        ("microbatches", _microbatches),
        ("ranks", _ranks),
        ("bytes", _bytes),
    ):
        if sizes[name]:
            with Conductor() as conductor:
                rows = measure(conductor, sizes[name], arguments)
            results[name] = _tell(name, rows, show)
    for name, one in (("rendezvous", _rendezvous), ("launch", _launch)):
        if sizes[name]:
            results[name] = _tell(name, one(sizes[name], arguments.rounds), show)
    return {"rounds": arguments.rounds, "series": results}


def _sizes(name: str, text: str) -> list[int]:
    if text == "none":
        return []
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        raise UsageError(f"--{name} is numbers with commas between, or none: not {text}") from None
    if min(sizes) < 1 or sizes != sorted(set(sizes)) or len(sizes) < 2:
        raise UsageError(f"--{name} is at least two sizes from 1 up, smallest first: not {text}")
    return sizes


# -- the series: each returns rows of {"size": ..., cost: ..., ...} --------------------------------


def _microbatches(
    conductor: Conductor, sizes: list[int], arguments: argparse.Namespace
) -> list[Row]:
    team = conductor.start_barepp(2, "--transport", arguments.transport)
    conductor.gather()
    cases = {
        size: Case(layers=7, hidden=32, batch=ROWS * size, microbatches=size) for size in sizes
    }
    turns = _take_turns({size: (team, case) for size, case in cases.items()}, arguments.rounds)
    return [
        {
            "size": size,
            "step_ms": step_ms,
            "us_each": 1e3 * step_ms / size,
            "cpu_ms": cpu_ms,
            "cpu_us_each": 1e3 * cpu_ms / size,
        }
        for size, answers in turns.items()
        for step_ms in [_step_ms(answers)]
        for cpu_ms in [_median_cpu_ms(answers)]
    ]


def _ranks(conductor: Conductor, sizes: list[int], arguments: argparse.Namespace) -> list[Row]:
    flags = ("--transport", arguments.transport)
    case = Case(layers=max(*sizes, 16) - 1, hidden=32)  # and the head: a layer for each rank
    teams = {size: conductor.start_barepp(size, *flags) for size in sizes}
    conductor.gather()
    turns = _take_turns({size: (team, case) for size, team in teams.items()}, arguments.rounds)
    rows = []
    for size, answers in turns.items():
        cpu_ms = _median_cpu_ms(answers)
        connections = [rank["connections"] for rank in answers[-1]]
        rows.append(
            {
                "size": size,
                "cpu_ms": cpu_ms,
                "us_each": 1e3 * cpu_ms / (2 * case.microbatches * size),  # for each action
                "step_ms": _step_ms(answers),
                "connections": max(connections),
            }
        )
    return rows


def _bytes(conductor: Conductor, sizes: list[int], arguments: argparse.Namespace) -> list[Row]:
    team = conductor.start_barepp(2, "--transport", arguments.transport)
    conductor.gather()
    cases = {
        size: Case(layers=2, hidden=max(1, size // 4), batch=4, microbatches=4, cheap=True)
        for size in sizes
    }
    turns = _take_turns({size: (team, case) for size, case in cases.items()}, arguments.rounds)
    return [
        {
            "size": size,
            "step_ms": step_ms,
            "gb_per_s": 8 * size / step_ms / 1e6,  # 4 activations there, 4 gradients back
        }
        for size, answers in turns.items()
        for step_ms in [_step_ms(answers)]
    ]


def _rendezvous(sizes: list[int], rounds: int) -> list[Row]:
    found: dict[int, list[Row]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, worlds in found.items():
            worlds.append(_crowd(size))
    return [
        {
            "size": size,
            **{
                f"{what}_ms": 1e3 * statistics.median(world[f"{what}_s"] for world in worlds)
                for what in ("attach", "join", "barrier")
            },
        }
        for size, worlds in found.items()
    ]


def _crowd(size: int) -> Row:
    """Run `barepp.bench.rendezvous_load` in a process without torch: its forks are then cheap."""
    done = subprocess.run(
        [sys.executable, "-m", "barepp.bench.rendezvous_load", str(size)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"{size} bare processes did not meet:\n{done.stderr[-2000:]}")
    found: Row = json.loads(done.stdout)
    return found


def _launch(sizes: list[int], rounds: int) -> list[Row]:
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(rounds + 1):
        for size, times in found.items():
            start = launch_barepp(size)
            if turn:  # the first start fills the caches of the file system
                times.append(1e3 * start.barrier_s)
    return [{"size": size, "barrier_ms": statistics.median(times)} for size, times in found.items()]


# -- turns and tables -----------------------------------------------------------------------------


def _take_turns(
    who: dict[int, tuple[Team, Case]], rounds: int
) -> dict[int, list[list[dict[str, Any]]]]:
    """Return for each size the answers of its team, round by round."""
    answers: dict[int, list[list[dict[str, Any]]]] = {size: [] for size in who}
    steps: dict[int, int] = {}
    for turn in range(rounds + 1):
        for size, (team, case) in who.items():
            team.build(case)
            team.train("1f1b", 2)  # connects and warms up
            if not turn:
                guess = statistics.median(step_times(team.train("1f1b", 2)))
                steps[size] = max(3, min(100, round(TURN_S / guess)))
            else:
                answers[size].append(team.train("1f1b", steps[size]))
    return answers


def _step_ms(answers: list[list[dict[str, Any]]]) -> float:
    return 1e3 * spread([second for answer in answers for second in step_times(answer)]).median


def _median_cpu_ms(answers: list[list[dict[str, Any]]]) -> float:
    """Return the processor time of a step, of all ranks: the median of the rounds."""
    used_ms: list[float] = [
        1e3 * sum(rank["cpu_s"] for rank in answer) / len(answer[0]["ends"]) for answer in answers
    ]
    return statistics.median(used_ms)


def _tell(name: str, rows: list[Row], show: Show) -> dict[str, Any]:
    """Show a series and what it grows like; return both."""
    what = SERIES[name][1]
    show(f"\n{name}")
    titled = [{what: row["size"], **_rounded(row)} for row in rows]
    for line in table(titled):
        show(line)
    fits = {}
    for cost in (key for key in rows[0] if key.endswith("_ms")):
        fit = growth([row["size"] for row in rows], [row[cost] for row in rows])
        fits[cost] = fit.to_record()
        show(
            f"{_title(cost)} = {fit.fixed:.3g} + {fit.each:.3g} * size, "
            f"size ** {fit.exponent:.2f} at the large end"
        )
    return {"rows": rows, "growth": fits}


def _rounded(row: Row) -> dict[str, str]:
    return {
        _title(key): f"{value:.2f}" if isinstance(value, float) else str(value)
        for key, value in row.items()
        if key != "size"
    }


def _title(key: str) -> str:
    return key.replace("_", " ")
