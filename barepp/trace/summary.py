"""What all ranks measured, put together: the same summary on every rank."""

from __future__ import annotations

import dataclasses
import resource
import statistics
from typing import TYPE_CHECKING, Final

import torch

from barepp.trace.recorder import AWAITED, Recorder
from barepp.trace.step_breakdown import RankTimes, longest_first, mean_times, own_time, table
from transport.collectives import all_reduce

if TYPE_CHECKING:
    from barepp.worker.world import World


_NUMBERS: Final = [
    field.name for field in dataclasses.fields(RankTimes) if field.name != "waits_ms"
]


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
    recorder.settle()
    # The first step warms up. (When some were forgotten, one more does not matter.)
    steps = list(recorder.steps)[1:] or list(recorder.steps)
    median_ns = statistics.median(times.step for times in steps) if steps else 0.0
    times = mean_times(steps, peak_in_flight, peak_memory_nbytes(world.device))
    size = world.world_size
    reasons = [(peer, what) for peer in range(size) for what in AWAITED]
    mine = torch.zeros(size, 8 + len(reasons), dtype=torch.float64)
    mine[world.rank] = torch.tensor([median_ns, *_numbers(times, reasons)], dtype=torch.float64)
    rows = (all_reduce(world.transport, mine) if size > 1 else mine).tolist()
    ranks = [_rank_times(row[1:], reasons) for row in rows]
    longest = size * max(rank.step_ms for rank in ranks)
    return Summary(
        step_ms=max(row[0] for row in rows) / 1e6,
        bubble=1 - sum(rank.computing_ms for rank in ranks) / longest if longest else 0.0,
        ranks=ranks,
    )


def _numbers(times: RankTimes, reasons: list[tuple[int, str]]) -> list[float]:
    """Return a rank's times as a row: its numbers, then how long it waited for each reason."""
    waits = dict.fromkeys(reasons, 0.0)
    for peer, what, ms in times.waits_ms:
        waits[peer, what] += ms  # KeyError: the row has no place for such a reason
    return [*(getattr(times, name) for name in _NUMBERS), *waits.values()]


def _rank_times(row: list[float], reasons: list[tuple[int, str]]) -> RankTimes:
    """Undo `_numbers`."""
    step, computing, sending, flushing, actions, peak, memory, *waits = row
    waits_ms = [(*reason, ms) for reason, ms in zip(reasons, waits, strict=True) if ms]
    return RankTimes(
        step, computing, longest_first(waits_ms), sending, flushing, actions, int(peak), int(memory)
    )
