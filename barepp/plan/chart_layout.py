"""A timeline as bars, before anything is drawn: which rank, from when to when, how it looks.

Here is decided what a picture shows, in numbers that tests can look at; chart_image.py only paints
them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

from barepp.errors import UsageError
from barepp.plan.colours import Style, shade
from barepp.plan.timeline import Timeline, stage_places, time_in
from barepp.program.actions import Action, Kind

MOST_BARS: Final = 50_000  # more would be minutes of work for a grey area

Interval = tuple[float, float]  # (start, end)


class Bar(NamedTuple):
    """One action."""

    rank: int
    start: float
    end: float
    action: Action
    colour: str  # "#rrggbb"
    label: str  # what fits; may be empty


class Idle(NamedTuple):
    """A time in which a rank waited, or had nothing to do."""

    rank: int
    start: float
    end: float


class Arrow(NamedTuple):
    """A message: from where and when, to where and when."""

    sender: int
    sent: float
    receiver: int
    used: float


class Panel(NamedTuple):
    """One timeline of a picture; times from 0 to `end`, in `unit`."""

    title: str
    unit: str
    num_ranks: int
    end: float
    bars: list[Bar]
    idle: list[Idle]
    bubbles: list[float]  # per rank: the part of the makespan in which it did not compute
    kinds: list[Kind]  # those that occur
    most_stages: int  # that a rank holds
    arrows: list[Arrow]
    tells_waits: bool  # whether what is neither a bar nor idle was spent on messages


def panel(
    timeline: Timeline,
    title: str,
    unit: str,
    *,
    end: float | None = None,
    characters: float = 150,
    waits: Sequence[Sequence[Interval]] | None = None,
    arrows: Sequence[Arrow] = (),
) -> Panel:
    """Lay out a timeline; `characters` is how many of a label's fit side by side from 0 to `end`.

    Without `waits`, all time in which a rank does not compute is idle, as in a plan. With them, for
    each rank, only those are, and the time before its first action and after its last one; what
    stays blank was spent on messages.

    Raises:
        UsageError: there are more than `MOST_BARS` actions.
    """
    count = sum(map(len, timeline.spans))
    if count > MOST_BARS:
        raise UsageError(f"{count} actions are too many for a picture; it has room for {MOST_BARS}")
    makespan = float(timeline.makespan)
    end = makespan if end is None else end
    most_stages = max((len(stage_places(row)) for row in timeline.spans), default=1)
    naming = most_stages > 1 and _stages_fit(timeline, end / characters)
    bars: list[Bar] = []
    idle: list[Idle] = []
    bubbles = []
    for rank, row in enumerate(timeline.spans):
        places = stage_places(row)
        spans = [(action, float(start), float(stop)) for action, start, stop in row]
        busy = [(start, stop) for _, start, stop in spans]
        idle += (Idle(rank, *gap) for gap in _idle(busy, makespan, waits[rank] if waits else None))
        for action, start, stop in spans:
            if stop > start:
                fits = int((stop - start) / end * characters - 0.3)  # and a little space
                colour = shade(Style(action.kind, places[action.stage]), len(places))
                label = label_that_fits(action, fits, with_stage=naming)
                bars.append(Bar(rank, start, stop, action, colour, label))
        bubbles.append(1 - float(time_in(row)) / makespan if makespan else 0.0)
    found = {bar.action.kind for bar in bars}
    kinds = [kind for kind in Kind if kind in found]
    return Panel(
        title, unit, len(bubbles), end, bars, idle, bubbles, kinds, most_stages,
        list(arrows), waits is not None,
    )  # fmt: skip


def _stages_fit(timeline: Timeline, character: float) -> bool:
    """Whether half of the actions or more have room for a label that names the stage."""
    rooms = [
        float(span.end - span.start) / character - len(str(span.action))
        for row in timeline.spans
        for span in row
    ]
    return bool(rooms) and statistics.median(rooms) >= 0


def label_that_fits(action: Action, characters: int, *, with_stage: bool) -> str:
    """Return the longest of 2F10, F10 and 10 that has at most so many characters, or nothing."""
    full = str(action)
    short = full.lstrip("0123456789")
    texts = [full, short, short[1:]] if with_stage else [short, short[1:]]
    return next((text for text in texts if len(text) <= characters), "")


def _idle(
    busy: Sequence[Interval], makespan: float, waits: Sequence[Interval] | None
) -> list[Interval]:
    """Return the gaps from 0 to the makespan; with `waits`, what of those inside was waiting."""
    if not busy:
        return [(0.0, makespan)] if makespan else []
    ends = [0.0, *(stop for _, stop in busy)]
    starts = [*(start for start, _ in busy), makespan]
    gaps = list(zip(ends, starts, strict=True))
    if waits is not None:
        inner = [wait for wait in waits if busy[0][0] < wait[1] <= busy[-1][0]]
        gaps = [gaps[0], *inner, gaps[-1]]
    return [(start, stop) for start, stop in gaps if stop > start]
