"""Faults: who is told what, after how many milliseconds, and what is left; beside torchrun.

Four ranks train with 1F1B, about 30 ms a step; rank 2 fails in the forward of a microbatch of step
20. Every run is the real command line, from its start to the end of its last process. "told after"
is the time from just before the fault to the first line of the handler of the error that it raised
on another rank, for every rank and run; "launcher back after" is the time to the end of the
launcher's process. Each is shown as median / worst, over all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

from barepp.bench.faults_kinds import FAULTS, GLOO_S, NO_FAULT, Fault
from barepp.bench.faults_run import LIMIT_S, Seen, barepp_command, torch_command, watch
from barepp.bench.faults_table import BAREPP, HEAD, TORCH, Row, as_json, row_of
from barepp.errors import UsageError

RUNS: Final = 20
AGAINST_RUNS: Final = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    names = ",".join(FAULTS)
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"of barepp ({RUNS})")
    parser.add_argument("--faults", default=names, help=f"commas between (default: {names})")
    parser.add_argument("--against", choices=["torch"], help="the same under torchrun, over gloo")
    parser.add_argument(
        "--against-runs",
        type=int,
        default=AGAINST_RUNS,
        metavar="N",
        help=f"of it ({AGAINST_RUNS})",
    )


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Measure; return every run's figures beside the table's."""
    faults = _chosen(arguments.faults)
    against = arguments.against_runs if arguments.against is not None else 0
    if arguments.runs < 0 or against < 0 or arguments.runs + against < 1:
        raise UsageError("nothing to run: give --runs or --against torch a number from 1")
    sides = [(BAREPP, barepp_command, arguments.runs), (TORCH, torch_command, against)]
    show(
        f"runs of each fault: {arguments.runs} of barepp, {against} of torchrun (gloo's timeout "
        f"{GLOO_S:g} s); patience after a fault: {LIMIT_S:g} s\n\n{HEAD}"
    )
    rows: list[Row] = []
    runs: list[dict[str, Any]] = []
    misses: list[str] = []
    for fault in faults:
        for launcher, command, count in sides:
            if not count:
                continue
            row, seen = _measured(fault, launcher, command, count)
            show(row.cells())
            rows.append(row)
            runs += [{"launcher": launcher, **dataclasses.asdict(one)} for one in seen]
            if launcher == BAREPP:
                misses += [f"{fault.name}: {miss}" for miss in row.misses(fault)]
    if arguments.runs:
        verdict = ["barepp falls short:", *misses] if misses else ["barepp: every limit was kept"]
        show("\n".join(["", *verdict]))
    return {"rows": [as_json(row) for row in rows], "runs": runs, "misses": misses}


def _measured(
    fault: Fault, launcher: str, command: Callable[[Fault], list[str]], count: int
) -> tuple[Row, Sequence[Seen]]:
    """Run one fault under one launcher, then the same command without it."""
    seen = [watch(command, fault) for _ in range(count)]
    healthy = dataclasses.replace(NO_FAULT, flags=fault.flags)
    return row_of(fault, launcher, seen, again=watch(command, healthy).code == 0), seen


def _chosen(names: str) -> list[Fault]:
    unknown = [name for name in names.split(",") if name not in FAULTS]
    if unknown:
        raise UsageError(f"there is no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    return [FAULTS[name] for name in names.split(",")]
