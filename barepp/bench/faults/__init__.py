"""Faults: who is told what, after how many milliseconds, and what is left; beside torchrun.

Four ranks train with 1F1B; rank 2 fails in the forward of a microbatch of step 20. Every run is the
real command line, from its start to the end of its last process. "told after" is the time from just
before the fault to the first line of the handler of the error that it raised on another rank, for
every rank and run; "launcher back after" is the time to the end of the launcher's process. Each is
shown as median / worst, over all runs.

All faults, and both launchers, take turns, so that a noisy hour of the machine favours none.

In reading order:

    kinds.py          the faults, and the limits that they are given
    ranks.py          what the ranks train and write down, under both launchers
    script_barepp.py  the script under `barepp.launch`
    script_torch.py   the script under torchrun
    watch.py          one run, from the command to the last process
    table.py          the runs as a table
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from barepp.bench.faults.kinds import FAULTS, GLOO_S, NO_FAULT, Fault
from barepp.bench.faults.table import BAREPP, HEAD, TORCH, as_json, row_of
from barepp.bench.faults.watch import LIMIT_S, Seen, barepp_command, torch_command, watch
from barepp.errors import UsageError

RUNS: Final = 20
AGAINST_RUNS: Final = 5

_COMMANDS: Final = {BAREPP: barepp_command, TORCH: torch_command}


@dataclasses.dataclass
class _Case:
    """One fault under one launcher; `again` is whether the command succeeded without the fault."""

    fault: Fault
    who: str
    runs: list[Seen] = dataclasses.field(default_factory=list)
    again: bool | None = None

    def run(self) -> None:
        self.runs.append(watch(_COMMANDS[self.who], self.fault))
        if self.again is None:
            healthy = dataclasses.replace(NO_FAULT, flags=self.fault.flags)
            self.again = watch(_COMMANDS[self.who], healthy).code == 0


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
    """Measure; return every run's figures beside the table's. Ctrl-C ends it with what there is."""
    faults = _chosen(arguments.faults)
    against = arguments.against_runs if arguments.against is not None else 0
    if arguments.runs < 0 or against < 0 or arguments.runs + against < 1:
        raise UsageError("nothing to run: give --runs or --against torch a number from 1")
    show(f"gloo's timeout: {GLOO_S:g} s; patience after a fault: {LIMIT_S:g} s")
    cases = [_Case(fault, who) for fault in faults for who in _COMMANDS]
    with contextlib.suppress(KeyboardInterrupt):
        _take_turns(cases, {BAREPP: arguments.runs, TORCH: against}, show)
    measured = [case for case in cases if case.again is not None]
    rows = [row_of(case.fault, case.who, case.runs, again=bool(case.again)) for case in measured]
    show("\n".join(["", HEAD, *(row.cells() for row in rows), ""]))
    ours = [row for row in rows if row.launcher == BAREPP]
    misses = [f"{row.fault}: {miss}" for row in ours for miss in row.misses(FAULTS[row.fault])]
    if ours:
        kept = "barepp kept every limit"
        show("\n".join(["barepp falls short:", *misses]) if misses else kept)
    runs = [{"launcher": c.who, **dataclasses.asdict(seen)} for c in measured for seen in c.runs]
    return {"rows": [as_json(row) for row in rows], "runs": runs, "misses": misses}


def _take_turns(
    cases: Sequence[_Case], wanted: Mapping[str, int], show: Callable[[str], None]
) -> None:
    """Run each case once a turn, until it has as many runs as its launcher is to have."""
    turns = max(wanted.values())
    for turn in range(turns):
        for case in cases:
            if turn < wanted[case.who]:
                case.run()
        show(f"turn {turn + 1} of {turns} is done")


def _chosen(names: str) -> list[Fault]:
    unknown = [name for name in names.split(",") if name not in FAULTS]
    if unknown:
        raise UsageError(f"there is no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    return [FAULTS[name] for name in names.split(",")]
