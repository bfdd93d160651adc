"""Puts the clocks of all ranks side by side: how far each is ahead of rank 0's, and how surely.

    rank 0      t0 ───── ping ────┐       ┌──── pong ────> t1
    rank r                        └> theirs

    ahead = theirs - (t0 + t1) / 2,   wrong by (t1 - t0) / 2 at most

for `theirs` was read between t0 and t1, whatever the two ways took. Of many exchanges the one with
the shortest way there and back is believed: Cristian (1989), "Probabilistic clock synchronization".
Two clocks drift apart by some microseconds a second, so they are compared before and after what was
measured, and in between the difference is taken to change evenly.

Processes that read one and the same clock are not asked: the difference is zero.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

if TYPE_CHECKING:
    from transport.base import Transport

EXCHANGES: Final = 32
_TAG: Final = -11  # negative tags are ours: a user's can never meet them
_NO_MORE: Final = torch.empty(0, dtype=torch.int64)


class Reading(NamedTuple):
    """One comparison of a rank's clock with rank 0's, in nanoseconds."""

    at: int  # on the rank's own clock
    ahead: int  # what it showed more than rank 0's
    error: int  # how wrong `ahead` can be; 0 for one and the same clock


def clock_name() -> str:
    """Return a name that two processes share when `time.perf_counter_ns` is the same clock in both.

    On Linux it is CLOCK_MONOTONIC, which counts from the boot of the machine; a time namespace may
    move it (time_namespaces(7)).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # a sandbox that hides /proc: this process shares its name with nobody
        return secrets.token_hex(16)
    try:
        return f"{boot}/{os.readlink('/proc/self/ns/time')}"
    except OSError:  # a kernel without time namespaces
        return boot


def compare_clocks(
    transport: Transport,
    clock: Callable[[], int] = time.perf_counter_ns,
    name: str | None = None,
) -> list[Reading]:
    """Return on rank 0 a reading of every rank's clock, nothing elsewhere; collective.

    It blocks for 32 round trips for each rank whose clock has another `name` than rank 0's.
    """
    mine = clock_name() if name is None else name
    if transport.rank > 0:
        transport.send(torch.tensor(list(mine.encode()), dtype=torch.uint8), 0, _TAG)
        while transport.recv(0, _TAG).numel():
            transport.send(torch.tensor([clock()]), 0, _TAG)
        return []
    readings = [Reading(clock(), 0, 0)]
    for rank in range(1, transport.world_size):
        theirs = bytes(transport.recv(rank, _TAG).tolist()).decode(errors="replace")
        if theirs == mine:
            readings.append(Reading(clock(), 0, 0))
        else:
            exchanges = [_exchange(transport, rank, clock) for _ in range(EXCHANGES)]
            readings.append(min(exchanges, key=lambda reading: reading.error))
        transport.send(_NO_MORE, rank, _TAG)
    return readings


def _exchange(transport: Transport, rank: int, clock: Callable[[], int]) -> Reading:
    ping = torch.zeros(1, dtype=torch.int64)
    before = clock()
    transport.send(ping, rank, _TAG)
    theirs = int(transport.recv(rank, _TAG))
    after = clock()
    return Reading(theirs, theirs - (before + after) // 2, (after - before + 1) // 2)


def on_rank_0s_clock(time_ns: int, readings: Sequence[Reading]) -> int:
    """Return what rank 0's clock showed when the clock that the readings are of showed this.

    One reading is one difference for ever; of two or more, the first and the last give the drift.
    """
    first, last = readings[0], readings[-1]
    ahead = first.ahead
    if last.at > first.at:
        # Whole numbers: as floats, nanoseconds since the boot would lose their last digits.
        ahead += (last.ahead - first.ahead) * (time_ns - first.at) // (last.at - first.at)
    return time_ns - ahead
