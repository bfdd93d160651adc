"""Draws the readings of a job as a table, in plain text: a line a rank.

    job 4711: demos/gpipe.py, 2 ranks over shm, running for 12.3 s
    rank     pid  state            for   steps micro/s   CPU   memory     in/s    out/s ...
       0    4713  computing 0F3  0.0 s     120    81.2   97%  312 MiB  1.2 MiB  1.2 MiB ...

What is not known is a "-". Where a terminal is too narrow, the right end is cut off.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from barepp.monitor.rates import RankRates
    from barepp.monitor.status import JobStatus

MIN_INTERVAL_S: Final = 0.1
MAX_INTERVAL_S: Final = 86400.0

WIDE_STATE: Final = 42  # "waiting for the input of 12F34 from rank 5"
NARROW_STATE: Final = 28  # the same without "the input of"
_OTHERS_WIDTH: Final = 88  # of all other columns
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB")


def picture(
    job: JobStatus,
    readings: Sequence[RankRates],
    columns: int | None = None,
    lines: int | None = None,
) -> list[str]:
    """Return the table's lines, within a terminal of `columns` and `lines`; None is no bound."""
    state_width = WIDE_STATE
    if columns is not None:
        state_width = min(WIDE_STATE, max(NARROW_STATE, columns - _OTHERS_WIDTH))
    ranks = "1 rank" if job.world_size == 1 else f"{job.world_size} ranks"
    head = f"job {job.pid}: {job.task}, {ranks} over {job.transport}"
    rows = [f"{head}, running for {seconds(job.age_s)}", _header(state_width)]
    rows += [_row(reading, state_width) for reading in readings]
    if lines is not None and len(rows) >= lines:  # the cursor stands on a line of its own
        left_out = len(rows) - max(lines - 2, 2)
        rows = [*rows[: max(lines - 2, 2)], f"and {left_out} more"]
    return rows if columns is None else [cut(row, columns) for row in rows]


def as_object(job: JobStatus, readings: Sequence[RankRates]) -> dict[str, Any]:
    """Return the same as what JSON takes: rates a second, None where nothing is known."""
    ranks = []
    for reading in readings:
        facts = {**vars(reading), **reading.status.to_record()}
        del facts["status"], facts["measured_at"]
        ranks.append({**facts, "state": reading.state, "state_s": reading.state_s})
    return {"job": job.to_record(), "ranks": ranks}


def _header(state_width: int) -> str:
    return (
        f"rank {'pid':>7}  {'state':{state_width}} {'for':>6} {'steps':>7} {'micro/s':>7} "
        f"{'CPU':>5} {'memory':>8} {'in/s':>8} {'out/s':>8} {'in':>8} {'out':>8}"
    )


def _row(reading: RankRates, state_width: int) -> str:
    status = reading.status
    percent, rate = reading.cpu_percent, reading.microbatches_per_s
    return (
        f"{status.rank:4} {_or_dash(status.pid):>7}  {_fitted(reading.state, state_width)} "
        f"{'-' if reading.state_s is None else seconds(reading.state_s):>6} "
        f"{_or_dash(status.steps):>7} {'-' if rate is None else f'{rate:.1f}':>7} "
        f"{'-' if percent is None else f'{percent:.0f}%':>5} {nbytes(reading.rss_nbytes):>8} "
        f"{nbytes(reading.received_per_s):>8} {nbytes(reading.sent_per_s):>8} "
        f"{nbytes(status.received_nbytes):>8} {nbytes(status.sent_nbytes):>8}"
    )


def _fitted(state: str, width: int) -> str:
    if len(state) > width:
        state = state.replace("the input of ", "")
    return f"{cut(state, width):{width}}"


def cut(text: str, width: int) -> str:
    """Return `text` in at most `width` characters."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


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
