"""Figures out of many repetitions: medians, quartiles, ratios; tables; the machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Spread = dict[str, float]  # the median of many measurements, and their quartiles, low and high


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


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
