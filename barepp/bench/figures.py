"""Figures out of many repetitions: medians, spread, ratios of paired rounds, growth; tables."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spread:
    """The middle of many measurements, and the quarter points: half of them lie in between."""

    median: float
    low: float
    high: float

    def to_record(self) -> dict[str, float]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)

    def text(self, digits: int = 2) -> str:
        """Return "1.23 [1.20 1.31]"."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f} {self.high:.{digits}f}]"


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def medians(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the median of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Spread:
    """Return ours / theirs, round by round: what slowed a whole round down cancels out."""
    pairs = zip(ours, theirs, strict=True)
    return spread([statistics.median(a) / statistics.median(b) for a, b in pairs])


def flat(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Return the measurements of all rounds in one list."""
    return [value for values in rounds for value in values]


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a cost grows with a size: fixed + each * size, and size ** exponent at the large end.

    An exponent of 1 is linear growth. It is that of the larger half of the sizes, where what is
    fixed no longer hides it; above 1 the cost grows faster than the size.
    """

    fixed: float
    each: float
    exponent: float

    def to_record(self) -> dict[str, float]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)


def growth(sizes: Sequence[float], costs: Sequence[float]) -> Growth:
    """Fit both; at least two sizes.

    The straight line minimises relative errors (weights 1 / cost**2): a run over three orders of
    magnitude would otherwise be fitted by its largest size alone.
    """
    weights = [1 / cost**2 for cost in costs]
    fixed, each = _line(sizes, costs, weights)
    half = min(len(sizes) // 2, len(sizes) - 2)
    logs = [[math.log(value) for value in values[half:]] for values in (sizes, costs)]
    _, exponent = _line(logs[0], logs[1], [1.0] * len(logs[0]))
    return Growth(fixed, each, exponent)


def _line(
    xs: Sequence[float], ys: Sequence[float], weights: Sequence[float]
) -> tuple[float, float]:
    total = sum(weights)
    x_mean = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y_mean = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    up = sum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys, strict=True))
    across = sum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs, strict=True))
    slope = up / across
    return y_mean - slope * x_mean, slope


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return aligned lines: the columns' names, then the rows; the first column is flush left."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


# What a figure was measured on: without it no figure can be compared with another.


def machine() -> dict[str, Any]:
    """Return the processor, its cores, how busy they were, and the versions that matter."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),  # processes that wanted a core in the last minute
        "python": platform.python_version(),
        "torch": _torch_version(),
        "kernel": platform.release(),
    }


def sentence(here: dict[str, Any]) -> str:
    """Return one line that says it, for the top of what is printed."""
    return (
        f"{here['processor']}, {here['cores']} cores, load {here['load']:.2f}; "
        f"Python {here['python']}, torch {here['torch']}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _torch_version() -> str:
    try:
        return version("torch")  # from the package's records: importing it takes a second
    except PackageNotFoundError:
        return "none"
