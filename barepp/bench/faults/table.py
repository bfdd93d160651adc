"""What many runs of one fault come to: medians, what was told right, what was left; as a table.

A rank counts as told when its blocked call raised anything. What it was told is right when the text
of that error names the rank and what happened to it; the launcher's report likewise.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

from barepp.bench.faults.kinds import FAULTS, SURVIVORS, is_right, report_is_right
from barepp.bench.faults.watch import LIMIT_S, Seen

HEAD: Final = (
    "| fault | launched by | runs | told after, ms | told right | launcher back after, ms "
    "| exit code | lines | left behind |\n|---|---|--:|--:|--:|--:|--:|--:|---|"
)

Row = dict[str, Any]


def row_of(fault: str, launcher: str, runs: Sequence[Seen]) -> Row:
    """Return what the runs of one fault under one launcher come to."""
    told = [each for seen in runs for each in seen.told.values()]
    row: Row = {
        "fault": fault,
        "launcher": launcher,
        "runs": len(runs),
        "told_ms": [ms for ms, _ in told],
        "told_of": len(SURVIVORS) * len(runs),  # how many should have been told
        "ranks_right": sum(is_right(fault, launcher, text) for _, text in told),
        "reports_right": sum(report_is_right(fault, launcher, seen.output) for seen in runs),
        "back_ms": [seen.back for seen in runs if seen.back is not None],
        "codes": [seen.code for seen in runs if seen.code is not None],
        "lines": statistics.median(len(seen.output.splitlines()) for seen in runs),
        "processes_left": max(len(seen.processes) for seen in runs),
        "files_left": max(len(seen.files) for seen in runs),
    }
    for name in ("told_ms", "back_ms"):
        if row[name]:
            row[f"{name}_median"] = statistics.median(row[name])
            row[f"{name}_worst"] = max(row[name])
    return row


def cells(row: Row) -> str:
    """Return the row as a line of a Markdown table."""
    flags = FAULTS[row["fault"]]
    columns = [
        f"{row['fault']}, `{' '.join(flags)}`" if flags else row["fault"],
        row["launcher"],
        str(row["runs"]),
        _times(row, "told_ms", row["told_of"]) or "nobody",
        f"{row['ranks_right']}/{row['told_of']} ranks, "
        f"{row['reports_right']}/{row['runs']} reports",
        _times(row, "back_ms", row["runs"]) or f"not in {LIMIT_S:g} s",
        ", ".join(map(str, sorted(set(row["codes"])))) or "–",
        f"{row['lines']:.0f}",
        _left(row["processes_left"], row["files_left"]),
    ]
    return f"| {' | '.join(columns)} |"


def _times(row: Row, name: str, of: int) -> str:
    """Return "median / worst", and how many these are of, if they are not all; "" for none."""
    if not (count := len(row[name])):
        return ""
    times = " / ".join(_ms(row[f"{name}_{which}"]) for which in ("median", "worst"))
    return times if count == of else f"{times} ({count} of {of})"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _left(processes: int, files: int) -> str:
    found = [
        f"{count} {one if count == 1 else many}"
        for count, one, many in ((processes, "process", "processes"), (files, "file", "files"))
        if count
    ]
    return ", ".join(found) or "nothing"
