"""When each rank did what, simulated or measured: its spans, and what follows from them."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import accumulate

from barepp.errors import UsageError
from barepp.program.actions import Kind
from barepp.program.dry_run import Number, Span


class Timeline:
    """The spans of each rank, in the order in which they ran; time begins at 0."""

    def __init__(self, spans: Iterable[Iterable[Span]]) -> None:
        self.spans = [list(row) for row in spans]

    @property
    def makespan(self) -> Number:
        """When the last span ends."""
        return max((row[-1].end for row in self.spans if row), default=0)

    @property
    def busy(self) -> Number:
        """The time that all ranks together spent in spans."""
        return sum(map(time_in, self.spans))

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which nothing ran: 1 - busy / (ranks * makespan)."""
        whole = len(self.spans) * self.makespan
        # Measured times are floats: their rounding must not make it less than nothing.
        return max(0.0, float(1 - Fraction(self.busy) / Fraction(whole))) if whole else 0.0

    @property
    def peak_in_flight(self) -> list[int]:
        """For each rank, the most forwards whose backward (its W, when split) had not yet run."""
        return [_peak(row) for row in self.spans]

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
        return [_peak(row, each) for row in self.spans]


# An I does not count: what its W will need is kept until that W has run.
_KEEPS = {Kind.F: 1, Kind.B: -1, Kind.I: 0, Kind.W: -1}


def _peak(row: Iterable[Span], weights: Sequence[int] | None = None) -> int:
    kept = (
        _KEEPS[kind] * (1 if weights is None else weights[stage]) for (stage, kind, _), _, _ in row
    )
    return max(accumulate(kept), default=0)


def time_in(row: Iterable[Span]) -> Number:
    """Return how long a rank was busy."""
    return sum(span.end - span.start for span in row)


def stage_places(row: Iterable[Span]) -> dict[int, int]:
    """Return for each stage of a rank which of its stages it is, from 0."""
    stages = sorted({span.action.stage for span in row})
    return {stage: place for place, stage in enumerate(stages)}
