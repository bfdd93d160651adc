"""What many runs of one fault come to: medians, what was told right, what was left; as a table.

A rank counts as told when its blocked call raised anything. What it was told is right when the
text of that error names the rank and what happened to it; the launcher's report likewise.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from typing import Any, Final

from barepp.bench.faults.kinds import SLEEPER, VICTIM, Fault, Where
from barepp.bench.faults.watch import LIMIT_S, ORPHAN_S, Seen

BAREPP: Final = "barepp"
TORCH: Final = "torchrun"

HEAD: Final = (
    "| fault | launched by | runs | told after, ms | told right | launcher back after, ms "
    "| exit code | lines | left behind | again |\n|---|---|--:|--:|--:|--:|--:|--:|---|---|"
)

_TOLD_MEDIAN_MS: Final = 100.0
_TOLD_WORST_MS: Final = 500.0
_BACK_MS: Final = 1000.0


@dataclasses.dataclass
class Row:
    """One fault under one launcher.

    Attributes:
        told_ms: for every rank and run in which it was told.
        told_of: how many should have been told.
        ranks_right, reports_right: how many texts were; a launcher that is dead reports nothing.
        back_ms: when the launcher came back, where it did; for a killed one, its last rank's end.
        sleeper_ms: when the rank that was busy elsewhere had ended.
        again: whether the same command, without the fault, succeeded at once afterwards.
    """

    fault: str
    shown: str
    launcher: str
    runs: int
    told_ms: list[float]
    told_of: int
    ranks_right: int
    reports_right: int | None
    back_ms: list[float]
    sleeper_ms: list[float]
    codes: list[int]
    lines: float | None
    processes_left: int
    files_left: int
    again: bool

    def cells(self) -> str:
        """Return the row as a line of a Markdown table."""
        told = _times(self.told_ms) if self.told_ms else "nobody"
        if 0 < len(self.told_ms) < self.told_of:
            told += f" ({len(self.told_ms)} of {self.told_of})"
        if self.sleeper_ms:
            told += f"; busy one ended {_times(self.sleeper_ms)}"
        right = f"{self.ranks_right}/{self.told_of} ranks"
        if self.reports_right is not None:
            right += f", {self.reports_right}/{self.runs} reports"
        patience = ORPHAN_S if self.reports_right is None else LIMIT_S
        back = _times(self.back_ms) if self.back_ms else f"not in {patience:g} s"
        if 0 < len(self.back_ms) < self.runs:
            back += f" ({len(self.back_ms)} of {self.runs})"
        cells = [
            self.shown,
            self.launcher,
            str(self.runs),
            told,
            right,
            back,
            ", ".join(map(str, sorted(set(self.codes)))) or "–",
            f"{self.lines:.0f}" if self.lines is not None else "–",
            _left(self.processes_left, self.files_left),
            "yes" if self.again else "no",
        ]
        return f"| {' | '.join(cells)} |"

    def misses(self, fault: Fault) -> list[str]:
        """Return in what the row falls short of what barepp promises."""
        found = []
        if len(self.told_ms) < self.told_of or self.ranks_right < self.told_of:
            found.append(f"{self.ranks_right} of {self.told_of} ranks were told right")
        if self.reports_right is not None and self.reports_right < self.runs:
            found.append(f"{self.reports_right} of {self.runs} reports were right")
        if set(self.codes) != {fault.code}:
            found.append(f"exit codes {sorted(set(self.codes))}, not {fault.code}")
        patience = fault.patience_s * 1e3
        limit = patience + _BACK_MS
        worst = _TOLD_WORST_MS if not patience else limit
        if self.told_ms and not patience and statistics.median(self.told_ms) > _TOLD_MEDIAN_MS:
            found.append(f"told after more than {_TOLD_MEDIAN_MS:.0f} ms in the median")
        if self.told_ms and max(self.told_ms) > worst:
            found.append(f"told after {max(self.told_ms):.0f} ms, over {worst:.0f}")
        if len(self.back_ms) < self.runs or max(self.back_ms) > limit:
            latest = f"{max(self.back_ms):.0f} ms" if self.back_ms else "never"
            found.append(f"back after {latest}, over {limit:.0f} ms")
        if self.processes_left or self.files_left:
            found.append("something was left behind")
        if not self.again:
            found.append("the same command did not succeed afterwards")
        return found


def row_of(fault: Fault, launcher: str, runs: Sequence[Seen], *, again: bool) -> Row:
    """Return what the runs come to."""
    told = [seen.told[rank] for seen in runs for rank in fault.told if rank in seen.told]
    # A dead launcher's ranks are on their own: what counts is when the last one had ended.
    headless = fault.name == "launcher"
    backs = [_last_end(seen) if headless else seen.back for seen in runs]
    texts = [seen.output for seen in runs]
    lefts = [[name.startswith("process ") for name in seen.left] for seen in runs]
    return Row(
        fault=fault.name,
        shown=f"{fault.shown}, `{' '.join(fault.flags)}`" if fault.flags else fault.shown,
        launcher=launcher,
        runs=len(runs),
        told_ms=[ms for ms, _ in told],
        told_of=len(fault.told) * len(runs),
        ranks_right=sum(is_right(fault, launcher, text) for _, text in told),
        reports_right=None
        if headless
        else sum(_report_is_right(fault, launcher, text) for text in texts),
        back_ms=[ms for ms in backs if ms is not None],
        sleeper_ms=[seen.ended[SLEEPER] for seen in runs if SLEEPER in seen.ended]
        if fault.name == "busy"
        else [],
        codes=[seen.code for seen in runs if seen.code is not None],
        lines=statistics.median(len(text.splitlines()) for text in texts),
        processes_left=max(sum(left) for left in lefts),
        files_left=max(len(left) - sum(left) for left in lefts),
        again=again,
    )


def is_right(fault: Fault, launcher: str, text: str) -> bool:
    """Whether a text names the rank and what happened to it."""
    if launcher == BAREPP:
        return re.search(fault.words, text) is not None
    somebody = fault.where is Where.LAUNCHER or re.search(rf"(?i)\brank\W*{VICTIM}\b", text)
    return bool(somebody) and re.search(fault.theirs, text) is not None


def root_cause(text: str) -> str:
    """Return what torchrun's report says of the first failure; "" without a report."""
    _, found, rest = text.rpartition("Root Cause (first observed failure):")
    return rest if found else ""


def _report_is_right(fault: Fault, launcher: str, output: str) -> bool:
    if launcher == BAREPP:
        return is_right(fault, launcher, output) and bool(re.search(fault.report, output))
    # (Of its own end torchrun makes no report: the traceback has to do.)
    return is_right(
        fault, launcher, output if fault.where is Where.LAUNCHER else root_cause(output)
    )


def as_json(row: Row) -> dict[str, Any]:
    """Return the row's figures, with the medians and worst cases worked out."""
    record = dataclasses.asdict(row)
    for name in ("told_ms", "back_ms", "sleeper_ms"):
        values = record[name]
        record[name] = [round(value, 3) for value in values]
        if values:
            record[f"{name}_median"] = round(statistics.median(values), 3)
            record[f"{name}_worst"] = round(max(values), 3)
    return record


def _last_end(seen: Seen) -> float | None:
    return (
        None
        if any(name.startswith("process ") for name in seen.left)
        else max(seen.ended.values(), default=None)
    )


def _times(values: Sequence[float]) -> str:
    """Return "median / worst"."""
    return " / ".join(_ms(value) for value in (statistics.median(values), max(values)))


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _left(processes: int, files: int) -> str:
    found = [
        f"{count} {one if count == 1 else many}"
        for count, one, many in ((processes, "process", "processes"), (files, "file", "files"))
        if count
    ]
    return ", ".join(found) or "nothing"
