"""A timeline as text: ranks down, ticks or milliseconds across; in colours where wanted."""

import math
import statistics
import textwrap
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

from barepp.plan.colours import MEANING, Style, painted
from barepp.plan.timeline import Timeline, stage_places
from barepp.program.actions import Action, Kind
from barepp.program.dry_run import Number, Span

# The shortest span may take this many ticks; a finer grid would be mostly dashes.
_FINEST = 6
# A drawing that needs more bands than this one under the other is cut off, with a sentence.
_MOST_BANDS = 12


class _Row(NamedTuple):
    """A line of characters, and how each is painted; None for what is idle or between spans."""

    text: list[str]
    styles: list[Style | None]

    def show(self, first: int, last: int, colours: bool) -> str:
        """Return the columns from first to last."""
        text = "".join(self.text[first:last]).rstrip()
        if not colours:
            return text
        shown, at = "", 0
        for style, run in groupby(self.styles[first:last][: len(text)]):
            length = len(list(run))
            shown += painted(text[at : at + length], style)
            at += length
        return shown


def draw(timeline: Timeline, width: int = 120, *, colours: bool = False) -> str:
    """Return the grid as text at most `width` columns wide, and a legend.

    tick    0  1  2  3  4  5  6  7  8  9  10 11
    rank 0  F0 F1 .  .  B0--- F2 B1--- .  B2---
    rank 1  .  F0 B0--- F1 B1--- F2 B2--- .  .

    A span of several ticks is drawn with dashes, an idle tick as a dot.

    A grid that is too wide loses the space between cells; if that is not enough, it goes on below,
    in bands, as music does.
    """
    spans = [span for row in timeline.spans for span in row if span.end > span.start]
    if not spans:
        return "nothing takes any time: there is nothing to draw"
    tick, is_exact = _tick(timeline, spans)
    labels = _labels(timeline)
    name_width = len(f"rank {len(timeline.spans) - 1}") + 2
    room = max(width - name_width, 12)  # for a few cells at least
    ticks = max(_to_ticks(span.end, tick) for span in spans)
    cell = max(len(label) for label in labels.values()) + 1
    if ticks * cell > room + 1 and ticks * (cell - 1) <= room:
        cell -= 1
    one_band = ticks * cell <= room + 1  # the space after the last cell needs no room
    per_band = ticks if one_band else room // cell
    drawn = min(ticks, _MOST_BANDS * per_band)
    rows = [_grid_row(row, labels, tick, drawn, cell) for row in timeline.spans]
    lines: list[str] = []
    for first in range(0, drawn, per_band):
        last = min(first + per_band, ticks)
        lines.append("tick".ljust(name_width) + _header(first, last, ticks, cell))
        for rank, row in enumerate(rows):
            text = row.show(first * cell, last * cell, colours)
            lines.append((f"rank {rank}".ljust(name_width) + text).rstrip())
        lines.append("")
    if ticks > drawn:
        lines.append(f"({ticks - drawn} of {ticks} ticks are not drawn)")
    legend = _legend(labels, tick, is_exact)
    return "\n".join([*lines, *textwrap.wrap(legend, max(width, 40))])


def _tick(timeline: Timeline, spans: list[Span]) -> tuple[Fraction, bool]:
    """Return the time that one column stands for, and whether every span begins and ends on one.

    The greatest common divisor of all times would always do, but costs of 1 and 1.001 would make a
    grid of thousands of columns; then half the shortest span is one column, and times are rounded.
    """
    times = {Fraction(time) for row in timeline.spans for span in row for time in span[1:]}
    bottom = math.lcm(*(time.denominator for time in times))
    exact = Fraction(math.gcd(*(int(time * bottom) for time in times)), bottom)
    shortest = min(Fraction(span.end) - Fraction(span.start) for span in spans)
    if shortest / exact <= _FINEST:
        return exact, True
    return shortest / 2, False


def _to_ticks(time: Number, tick: Fraction) -> int:
    return math.floor(Fraction(time) / tick + Fraction(1, 2))


def _labels(timeline: Timeline) -> dict[Action, str]:
    """Return what stands in each cell: F0, or 2F0 if a rank holds several stages."""
    stages = [{span.action.stage for span in row} for row in timeline.spans]
    several = any(len(held) > 1 for held in stages)
    return {
        span.action: str(span.action) if several else str(span.action).lstrip("0123456789")
        for row in timeline.spans
        for span in row
    }


def _grid_row(
    row: list[Span], labels: dict[Action, str], tick: Fraction, ticks: int, cell: int
) -> _Row:
    """Return the row up to so many ticks."""
    drawn = _Row(list(".".ljust(cell) * ticks), [None] * (cell * ticks))
    places = stage_places(row)
    for action, start, end in row:
        # (One column beyond the last is enough of a span that is a billion times another's.)
        first, stop = _to_ticks(start, tick), min(_to_ticks(end, tick), ticks + 1)
        if stop <= first or first >= ticks:  # it takes no time, or is not drawn
            continue
        # The last column stays empty where there is a space between cells.
        inked = (stop - first) * cell - (1 if cell > len(labels[action]) else 0)
        text = labels[action].ljust(inked, "-" if stop - first > 1 else " ")
        style = Style(action.kind, places[action.stage])
        where = slice(first * cell, min(stop, ticks) * cell)
        length = where.stop - where.start
        drawn.text[where] = text.ljust(length)[:length]
        drawn.styles[where] = ([style] * inked + [None] * cell)[:length]
    return drawn


def _header(first: int, last: int, ticks: int, cell: int) -> str:
    """Return the numbers of the ticks, as many as fit with a space between."""
    strides = (base * 10**power for power in range(9) for base in (1, 2, 5))
    stride = next(s for s in strides if s * cell > len(str(ticks - 1)))
    marks = (str(t) if t % stride == 0 else "" for t in range(first, last))
    text = ""
    for index, mark in enumerate(marks):
        if mark:
            text = text.ljust(index * cell) + mark
    return text


def _legend(labels: dict[Action, str], tick: Fraction, is_exact: bool) -> str:
    shown: dict[Kind, str] = {}
    for action in sorted(labels, key=lambda a: (list(Kind).index(a.kind), a.stage, a.microbatch)):
        where = "" if labels[action][0] == action.kind else f", stage {action.stage}"
        meaning = f"{labels[action]} {MEANING[action.kind]} of microbatch {action.microbatch}"
        shown.setdefault(action.kind, meaning + where)
    size = f"one tick = {float(tick):g}" + ("" if is_exact else ", rounded")
    return "; ".join([*shown.values(), ". idle", size])


def draw_to_scale(
    timeline: Timeline, width: int = 120, *, end: float | None = None, colours: bool = False
) -> str:
    """Return the timeline in columns of equal time, from 0 to `end` (the makespan), in ms.

    ms      0         5         10        15
    rank 0  F0--F1--......B0-----B1------...
    rank 1  ....F0--B0----F1--B1-----.......

    An action takes one column at least, so a very short one may hide part of the one before it. A
    label that does not fit is cut: F10, F. The stage, 2F10, is there if it usually fits.
    """
    end = float(timeline.makespan) if end is None else end
    name_width = len(f"rank {len(timeline.spans) - 1}") + 2
    room = max(width - name_width, 12)
    column = end / room
    if not column:
        return "nothing takes any time: there is nothing to draw"
    labels = _labels(timeline)
    usual = statistics.median(float(end - start) for row in timeline.spans for _, start, end in row)
    if usual <= max(map(len, labels.values())) * column:
        labels = {action: label.lstrip("0123456789") for action, label in labels.items()}
    lines = ["ms".ljust(name_width) + _scale(end, room)]
    used = min(room, math.ceil(float(timeline.makespan) / column - 1e-9))
    for rank, row in enumerate(timeline.spans):
        drawn = _scaled_row(row, labels, column, used)
        lines.append(f"rank {rank}".ljust(name_width) + drawn.show(0, used, colours))
    return "\n".join(lines)


def _scaled_row(row: list[Span], labels: dict[Action, str], column: float, room: int) -> _Row:
    drawn = _Row(["."] * room, [None] * room)
    places = stage_places(row)
    for action, start, end in row:
        first = min(round(float(start) / column), room - 1)
        stop = min(max(first + 1, round(float(end) / column)), room)
        texts = (labels[action], labels[action].lstrip("0123456789"), action.kind.value)
        label = next(text for text in texts if len(text) <= max(1, stop - first))
        drawn.text[first:stop] = label.ljust(stop - first, "-")
        style = Style(action.kind, places[action.stage])
        drawn.styles[first:stop] = [style] * (stop - first)
    return drawn


def _scale(end: float, room: int) -> str:
    """Return the numbers of an axis from 0 to `end`, a little apart."""
    step = nice_step(end, room // 8)
    text, number = "", 0
    while number * step <= end:
        at = round(number * step / end * room)
        mark = f"{number * step:g}"
        if at + len(mark) <= room and at >= len(text):
            text = text.ljust(at) + mark
        number += 1
    return text


def nice_step(end: float, most: int) -> float:
    """Return 1, 2 or 5 times a power of ten, so that at most `most` of it make up `end`."""
    power = 10.0 ** math.floor(math.log10(end / max(1, most)))
    return next(base * power for base in (1, 2, 5, 10) if base * power * max(1, most) >= end)
