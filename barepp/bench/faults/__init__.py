"""Faults: who is told what, after how many milliseconds, and what is left; beside torchrun.

    python -m barepp.bench faults [--runs 20] [--against torch] [--json PATH]

Four ranks train with 1F1B; rank 2 fails in the forward of a microbatch of step 20. Every run is the
real command line, from its start to its end. "Told after" is the time from just before the fault to
the handler of the error that it raised on another rank, for every rank and run; "launcher back
after" is the time to the end of the launcher's process. Each is shown as median / worst, over all
runs. The fault and the count of what is left are those of `barepp.testing`, on both sides.

All faults, and both launchers, take turns, so that a noisy hour of the machine favours neither.

In reading order:

    kinds.py    the faults, their limits, and which words tell them right
    script.py   what the ranks train, under both launchers
    watch.py    one run, from the command to what it leaves
    table.py    the runs as a table
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Final

from barepp.bench.faults.kinds import BAREPP, FAULTS, GLOO_S, TORCH
from barepp.bench.faults.table import HEAD, cells, row_of
from barepp.bench.faults.watch import LIMIT_S, Seen, command, watch
from barepp.errors import UsageError

RUNS: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    names = ",".join(FAULTS)
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"of each ({RUNS})")
    parser.add_argument("--faults", default=names, help=f"commas between (default: {names})")
    parser.add_argument("--against", choices=["torch"], help="the same under torchrun, over gloo")


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Measure; return every run's figures beside the table's. Ctrl-C ends it with what there is."""
    faults = arguments.faults.split(",")
    if unknown := [name for name in faults if name not in FAULTS]:
        raise UsageError(f"there is no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    if arguments.runs < 1:
        raise UsageError("--runs starts at 1")
    launchers = (BAREPP, TORCH) if arguments.against == "torch" else (BAREPP,)
    show(f"gloo's timeout: {GLOO_S:g} s; patience after a fault: {LIMIT_S:g} s")
    cases: dict[tuple[str, str], list[Seen]] = {(f, who): [] for f in faults for who in launchers}
    with contextlib.suppress(KeyboardInterrupt):
        for turn in range(arguments.runs):
            for (fault, launcher), runs in cases.items():
                runs.append(watch(command(launcher, fault)))
            show(f"turn {turn + 1} of {arguments.runs} is done")
    rows = [row_of(*case, runs) for case, runs in cases.items() if runs]
    show("\n".join(["", HEAD, *map(cells, rows), ""]))
    return {
        "rows": rows,
        "runs": [
            {"fault": fault, "launcher": launcher, **dataclasses.asdict(seen)}
            for (fault, launcher), runs in cases.items()
            for seen in runs
        ],
    }
