"""What all ranks measured, put together: the same summary on every rank."""

from __future__ import annotations

import dataclasses
import resource
import statistics
from typing import TYPE_CHECKING

import torch

from barepp.trace.recorder import AWAITED, Recorder
from barepp.trace.step_breakdown import RankTimes, longest_first, own_time, table
from transport.collectives import all_reduce

if TYPE_CHECKING:
    from barepp.worker.world import World


@dataclasses.dataclass(frozen=True)
class Summary:
    """Times of the last steps over all ranks, the very first left out if others are there.

    bubble = 1 - computing / (ranks * step time), as `barepp.plan` defines it for the prediction. A
    step lasts from the call of `Pipeline.step` to its loss, on the rank where that takes longest.
    """

    step_ms: float
    bubble: float
    ranks: list[RankTimes]

    def table(self) -> str:
        """Return where a step's time went, as lines for a person: a row for each rank."""
        return "\n".join([*table(self.ranks), "", own_time(self.ranks)])

    @property
    def computing_ms(self) -> list[float]:
        """Per rank, the mean of a step: inside actions."""
        return [rank.computing_ms for rank in self.ranks]

    @property
    def waiting_ms(self) -> list[float]:
        """Per rank: for messages to come, and at the end for its own to leave."""
        return [rank.waiting_ms + rank.flushing_ms for rank in self.ranks]

    @property
    def moving_ms(self) -> list[float]:
        """Per rank: all that is neither computing nor waiting."""
        return [rank.moving_ms for rank in self.ranks]

    @property
    def peak_in_flight(self) -> list[int]:
        """Per rank: the most forwards that were kept for their backward at one time."""
        return [rank.peak_in_flight for rank in self.ranks]


def peak_memory_nbytes(device: torch.device) -> int:
    """Return the most memory that this process had in use: its peak resident set.

    It includes what it shares with the other ranks of its host, torch's code above all; and where
    ranks are threads, it is that of all of them. On a GPU it is what its tensors took there.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # getrusage(2): in KiB


def summarise(world: World, recorder: Recorder, peak_in_flight: int) -> Summary:
    """Put all ranks' sums together; collective, the same result on every rank."""
    size = world.world_size
    mine = torch.zeros(size, 9 + size * len(AWAITED), dtype=torch.float64)
    mine[world.rank] = torch.tensor(_sums(world, recorder, peak_in_flight), dtype=torch.float64)
    rows = (all_reduce(world.transport, mine) if size > 1 else mine).tolist()
    longest = size * max(row[1] for row in rows)
    return Summary(
        step_ms=max(row[0] for row in rows) / 1e6,
        bubble=1 - sum(row[2] for row in rows) / longest if longest else 0.0,
        ranks=[_rank_times(row, size) for row in rows],
    )


def _sums(world: World, recorder: Recorder, peak_in_flight: int) -> list[float]:
    """Return this rank's row: nine numbers, then what it waited, for each rank for each thing."""
    size = world.world_size
    recorder.settle()
    # The first step warms up. (When some were forgotten, one more does not matter.)
    steps = list(recorder.steps)[1:] or list(recorder.steps)
    took = [times.step for times in steps]
    waits = dict.fromkeys([(peer, what) for peer in range(size) for what in AWAITED], 0)
    for times in steps:
        for reason, waited in times.waits.items():
            waits[reason] += waited
    return [
        statistics.median(took) if took else 0.0,
        sum(took),
        sum(times.compute for times in steps),
        sum(times.send for times in steps),
        sum(times.flush for times in steps),
        sum(times.actions for times in steps),
        max(1, len(steps)),
        peak_in_flight,
        peak_memory_nbytes(world.device),
        *waits.values(),
    ]


def _rank_times(row: list[float], size: int) -> RankTimes:
    _, total, compute, send, flush, actions, count, peak, memory, *waits = row
    scale = 1e6 * count
    reasons = [(peer, what) for peer in range(size) for what in AWAITED]
    return RankTimes(
        step_ms=total / scale,
        computing_ms=compute / scale,
        waits_ms=longest_first(
            (peer, what, waited / scale)
            for (peer, what), waited in zip(reasons, waits, strict=True)
            if waited
        ),
        sending_ms=send / scale,
        flushing_ms=flush / scale,
        actions=actions / count,
        peak_in_flight=int(peak),
        peak_memory_nbytes=int(memory),
    )
