"""When each rank did what, simulated or measured: its spans, and what follows from them.

As a command, `python -m barepp.timeline trace.json`, it is timeline.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple, overload

from barepp.errors import UsageError
from barepp.program.actions import Action, Kind
from barepp.program.dry_run import Number
from barepp.program.packed import PackedActions, place


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
        # Measured times are floats: their rounding must not make it less than nothing.
        return max(0.0, float(1 - Fraction(self.busy) / Fraction(whole))) if whole else 0.0

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
