"""The table of a job's ranks as plain text, one line a rank.

    job 4711: demos/gpipe.py, 2 ranks over shm, running for 12.3 s
    rank     pid  state            for   steps micro/s   CPU   memory     in/s    out/s ...
       0    4713  computing 0F3  0.0 s     120    81.2   97%  312 MiB  1.2 MiB  1.2 MiB ...

"-" stands for what is not known. Where a terminal is too narrow, the right end is cut off.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from barepp.monitor.rates import RankRates
    from barepp.monitor.status import JobStatus

_FORMAT: Final = "{:>4} {:>7}  {:{width}} {:>6} {:>7} {:>7} {:>5}" + " {:>8}" * 5
_NAMES: Final = ("rank", "pid", "state", "for", "steps", "micro/s", "CPU", "memory")
_HEADER: Final = (*_NAMES, "in/s", "out/s", "in", "out")

MIN_INTERVAL_S: Final = 0.1
MAX_INTERVAL_S: Final = 86400.0

WIDE_STATE: Final = 42  # "waiting for the input of 12F34 from rank 5"
NARROW_STATE: Final = 28  # the same without "the input of"
_OTHERS_WIDTH: Final = 88  # of all other columns
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB")


def picture(
    job: JobStatus, readings: Sequence[RankRates], size: os.terminal_size | None = None
) -> list[str]:
    """Return the table's lines, within a terminal of that size; None is no bound."""
    width = WIDE_STATE
    if size is not None:
        width = min(WIDE_STATE, max(NARROW_STATE, size.columns - _OTHERS_WIDTH))
    ranks = "1 rank" if job.world_size == 1 else f"{job.world_size} ranks"
    head = f"job {job.pid}: {job.task}, {ranks} over {job.transport}"
    rows = [f"{head}, running for {seconds(job.age_s)}", _FORMAT.format(*_HEADER, width=width)]
    rows += [_FORMAT.format(*_cells(reading, width), width=width) for reading in readings]
    if size is None:
        return rows
    if len(rows) >= size.lines:
        shown = max(size.lines - 2, 2)
        rows = [*rows[:shown], f"and {len(rows) - shown} more"]
    return [cut(row, size.columns) for row in rows]


def as_object(job: JobStatus, readings: Sequence[RankRates]) -> dict[str, Any]:
    """Return the same as what JSON takes: rates a second, None where nothing is known."""
    ranks = []
    for reading in readings:
        facts = {**vars(reading), **reading.status.to_record()}
        del facts["status"], facts["measured_at"]
        ranks.append({**facts, "state": reading.state, "state_s": reading.state_s})
    return {"job": job.to_record(), "ranks": ranks}


def _cells(reading: RankRates, width: int) -> Iterator[str]:
    status, state = reading.status, reading.state
    yield str(status.rank)
    yield _shown(status.pid)
    yield cut(state if len(state) <= width else state.replace("the input of ", ""), width)
    yield "-" if reading.state_s is None else seconds(reading.state_s)
    yield _shown(status.steps)
    yield _shown(reading.microbatches_per_s, "{:.1f}")
    yield _shown(reading.cpu_percent, "{:.0f}%")
    sizes = reading.rss_nbytes, reading.received_per_s, reading.sent_per_s
    yield from map(nbytes, (*sizes, status.received_nbytes, status.sent_nbytes))


def _shown(value: float | None, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)


def cut(text: str, width: int) -> str:
    """Return `text` in at most `width` characters."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def seconds(value: float) -> str:
    """Return a time for people: "3.2 s", "75 s", "12 min", "7 h"."""
    if value < 99.95:
        return f"{value:.1f} s"
    if value < 99.5 * 60:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.0f} h"


def nbytes(value: float | None) -> str:
    """Return a number of bytes for people, in at most 8 characters: "512 B", "1.2 MiB"."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.0f} B"
    power = 1
    while value / 1024**power >= 1000 and power < len(_UNITS):
        power += 1
    value, unit = value / 1024**power, _UNITS[power - 1]
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def interval(text: str) -> float:
    """Read the seconds between two pictures from a command line."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not MIN_INTERVAL_S <= seconds <= MAX_INTERVAL_S:
        allowed = f"seconds, from {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of {allowed}")
    return seconds
