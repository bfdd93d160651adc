"""Where a rank's step went: computing, waiting for whom, sending, and its own time; as a table."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from barepp.trace.recorder import StepTimes


@dataclasses.dataclass(frozen=True)
class RankTimes:
    """The mean of a step on one rank, in milliseconds."""

    step_ms: float
    computing_ms: float
    waits_ms: list[tuple[int, str, float]]  # for which rank, for what, how long; longest first
    sending_ms: float  # in isend
    flushing_ms: float  # at the end, until what was sent had left
    actions: float  # in a step
    peak_in_flight: int
    peak_memory_nbytes: int  # of the process, what it shares with others included; 0 if unknown

    @property
    def waiting_ms(self) -> float:
        """For messages of all other ranks."""
        return sum(ms for _, _, ms in self.waits_ms)

    @property
    def own_ms(self) -> float:
        """Neither computing, nor waiting, nor sending."""
        return self.step_ms - self.computing_ms - self.waiting_ms - self.communicating_ms

    @property
    def communicating_ms(self) -> float:
        """In isend, and until the messages had left."""
        return self.sending_ms + self.flushing_ms

    @property
    def moving_ms(self) -> float:
        """All that is neither computing nor waiting of any kind: in isend, and its own."""
        return self.sending_ms + self.own_ms


def mean_times(
    steps: Sequence[StepTimes], peak_in_flight: int, peak_memory_nbytes: int
) -> RankTimes:
    """Return the mean of a rank's steps; the waits in the order a person wants to hear of them."""
    count = max(1, len(steps))
    scale = 1e6 * count
    waits: dict[tuple[int, str], int] = defaultdict(int)
    for times in steps:
        for reason, waited in times.waits.items():
            waits[reason] += waited
    return RankTimes(
        step_ms=sum(times.step for times in steps) / scale,
        computing_ms=sum(times.compute for times in steps) / scale,
        waits_ms=longest_first((peer, what, ns / scale) for (peer, what), ns in waits.items()),
        sending_ms=sum(times.send for times in steps) / scale,
        flushing_ms=sum(times.flush for times in steps) / scale,
        actions=sum(times.actions for times in steps) / count,
        peak_in_flight=peak_in_flight,
        peak_memory_nbytes=peak_memory_nbytes,
    )


def longest_first(waits_ms: Iterable[tuple[int, str, float]]) -> list[tuple[int, str, float]]:
    """Return the waits in the order in which a person wants to hear of them."""
    return sorted(waits_ms, key=lambda wait: (-wait[2], wait[0]))


def table(ranks: Sequence[RankTimes]) -> list[str]:
    """Return lines for a person: the parts of a step, a row a rank, then whom each waited for."""
    longest = max((rank.step_ms for rank in ranks), default=0.0)
    lines = [
        "rank   peak in-flight   peak memory   computing   communication   waiting    own   bubble"
    ]
    for number, rank in enumerate(ranks):
        bubble = 1 - rank.computing_ms / longest if longest else 0.0
        lines.append(
            f"{number:4d} {rank.peak_in_flight:16d} {_mebibytes(rank.peak_memory_nbytes):>13}"
            f" {rank.computing_ms:11.2f} {rank.communicating_ms:15.2f} {rank.waiting_ms:9.2f}"
            f" {rank.own_ms:6.2f} {bubble:8.1%}"
        )
    return [*lines, *_reasons(ranks)]


def own_time(ranks: Sequence[RankTimes]) -> str:
    """Return the sentence on what an action costs beside its arithmetic: over all ranks."""
    actions = sum(rank.actions for rank in ranks)
    if not actions:
        return "own time        no action ran"
    own, sending = (
        1e3 * sum(part) / actions
        for part in ([r.own_ms for r in ranks], [r.sending_ms for r in ranks])
    )
    return (
        f"own time        {own + sending:.0f} µs an action beside computing and waiting: "
        f"{sending:.0f} in isend, {own:.0f} the rest"
    )


def _reasons(ranks: Sequence[RankTimes]) -> list[str]:
    """Return for each rank that waited at all: how long, for whom; not each hundredth of a step."""
    lines = []
    for number, rank in enumerate(ranks):
        told = [
            f"{ms:.2f} for rank {peer} ({what})"
            for peer, what, ms in rank.waits_ms
            if ms >= 0.01 * rank.step_ms
        ]
        if told:
            lines.append(f"rank {number} waited   {', '.join(told)}")
    return ["", *lines] if lines else []


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB" if nbytes else "-"
