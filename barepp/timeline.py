"""When each rank did what, simulated or measured, and its drawing: ranks down, ticks across."""

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple, overload

from barepp.actions import Action, Kind
from barepp.dry_run import Number
from barepp.errors import UsageError
from barepp.packed import PackedActions, place


class Span(NamedTuple):
    """One action and the time that it took."""

    action: Action
    start: Number
    end: Number


class SpanRow(Sequence[Span]):
    """The spans of one rank in three columns, so that millions fit; it reads like any list.

    The columns may count in a unit of their own; what is read from here is in time 1.
    """

    def __init__(
        self,
        actions: PackedActions,
        starts: Sequence[Number],
        ends: Sequence[Number],
        unit: int | Fraction = 1,
    ) -> None:
        self.actions = actions
        self._starts = starts
        self._ends = ends
        self._unit = unit

    @classmethod
    def of(cls, spans: Iterable[Span]) -> "SpanRow":
        """Return the row of these spans."""
        actions, starts, ends = zip(*spans, strict=True) if (spans := list(spans)) else ((), (), ())
        return cls(PackedActions(actions), starts, ends)

    @property
    def busy(self) -> Number:
        """The time that all spans together took."""
        return (sum(self._ends) - sum(self._starts)) * self._unit

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> list[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | list[Span]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        unit = self._unit
        return Span(self.actions[index], self._starts[index] * unit, self._ends[index] * unit)

    def __iter__(self) -> Iterator[Span]:
        for action, start, end in zip(self.actions, self._starts, self._ends, strict=True):
            yield Span(action, start * self._unit, end * self._unit)


class Timeline:
    """The spans of each rank, in the order in which they ran; time begins at 0."""

    def __init__(self, spans: Iterable[SpanRow | Iterable[Span]]) -> None:
        self.spans = [row if isinstance(row, SpanRow) else SpanRow.of(row) for row in spans]

    @property
    def makespan(self) -> Number:
        """When the last span ends."""
        return max((row[-1].end for row in self.spans if row), default=0)

    @property
    def busy(self) -> Number:
        """The time that all ranks together spent in spans."""
        return sum(row.busy for row in self.spans)

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which nothing ran: 1 - busy / (ranks * makespan)."""
        whole = len(self.spans) * self.makespan
        return float(1 - Fraction(self.busy) / Fraction(whole)) if whole else 0.0

    @property
    def peak_in_flight(self) -> list[int]:
        """For each rank, the most forwards whose backward (its W, when split) had not yet run."""
        return [_peak(row.actions) for row in self.spans]

    def peak_bytes(self, activation_bytes: int | Sequence[int], num_stages: int) -> list[int]:
        """Return for each rank the most bytes that it kept at one time for backwards to come.

        `activation_bytes` is what the forward of one microbatch leaves on its stage until its
        backward (its W, when split) has run: one number for all stages, or one for each.
        """
        if isinstance(activation_bytes, int):
            activation_bytes = [activation_bytes] * num_stages
        each = list(activation_bytes)
        if len(each) != num_stages or min(each) < 0:
            raise UsageError(
                f"the activation bytes are one number from 0 up for each of {num_stages} stages, "
                f"not {each}"
            )
        return [_peak(row.actions, each) for row in self.spans]


# An I does not count: what its W will need is kept until that W has run.
_KEEPS = {Kind.F: 1, Kind.B: -1, Kind.I: 0, Kind.W: -1}


def _peak(actions: PackedActions, weights: Sequence[int] | None = None) -> int:
    change = {
        place(stage, kind): sign * (1 if weights is None else weights[stage])
        for stage in actions.stages()
        for kind, sign in _KEEPS.items()
    }
    return max(accumulate(map(change.__getitem__, actions.each_place())), default=0)


_MEANING = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
}
# The shortest span may take this many ticks; a finer grid would be mostly dashes.
_FINEST = 6
# A drawing that needs more bands than this one under the other is cut off, with a sentence.
_MOST_BANDS = 12


def draw(timeline: Timeline, width: int = 120) -> str:
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
    rows = [_row(row, labels, tick, ticks, cell) for row in timeline.spans]
    lines: list[str] = []
    for first in range(0, min(ticks, _MOST_BANDS * per_band), per_band):
        last = min(first + per_band, ticks)
        lines.append("tick".ljust(name_width) + _header(first, last, ticks, cell))
        for rank, row in enumerate(rows):
            text = row[first * cell : last * cell]
            lines.append((f"rank {rank}".ljust(name_width) + text).rstrip())
        lines.append("")
    if ticks > _MOST_BANDS * per_band:
        lines.append(f"({ticks - _MOST_BANDS * per_band} of {ticks} ticks are not drawn)")
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


def _row(row: SpanRow, labels: dict[Action, str], tick: Fraction, ticks: int, cell: int) -> str:
    text = [".".ljust(cell)] * ticks
    for action, start, end in row:
        first, stop = _to_ticks(start, tick), _to_ticks(end, tick)
        if stop <= first:  # it takes no time
            continue
        # The last column stays empty where there is a space between cells.
        inked = (stop - first) * cell - (1 if cell > len(labels[action]) else 0)
        long = stop - first > 1
        drawn = labels[action].ljust(inked, "-" if long else " ").ljust((stop - first) * cell)
        text[first:stop] = [drawn[i : i + cell] for i in range(0, len(drawn), cell)]
    return "".join(text)


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
        meaning = f"{labels[action]} {_MEANING[action.kind]} of microbatch {action.microbatch}"
        shown.setdefault(action.kind, meaning + where)
    size = f"one tick = {float(tick):g}" + ("" if is_exact else ", rounded")
    return "; ".join([*shown.values(), ". idle", size])
