"""What a figure was measured on: without it no figure can be compared with another."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


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
