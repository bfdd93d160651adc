"""A clock of what the device does: when it came to a moment, not when that was asked of it.

On the CPU both are the same, and the clock is `time.perf_counter_ns`. A GPU does what it is given
some time later, while the rank's Python goes on. So a moment is an event in the rank's stream:

    mark()  ──> number        put an event into the current stream; nobody waits
    settle(number)            later: when the device came to it, and to all that were before

1. Times are nanoseconds of this clock. It starts near the host's `perf_counter_ns`; `compare` says
   how far it is ahead, and compared twice, how it drifts.
2. CUDA measures from event to event, as a float32 of milliseconds (CUDA Runtime API,
   cudaEventElapsedTime: 0.5 µs): each batch is measured from the last event of the one before, so
   that the digits last.

Not yet run on hardware.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from barepp.trace.clock_sync import Reading

COMPARISONS: Final = 8
_NS_PER_MS: Final = 1e6


class Clock(Protocol):
    """What tells the moments of an action; the numbers are nanoseconds, or become such later."""

    @property
    def mark(self) -> Callable[[], int]:
        """Returns this moment in the rank's work: all that it gave its device is done then."""

    @property
    def last(self) -> Callable[[], int]:
        """Returns the moment at which the device has nothing more to do, without a new mark."""


class _HostClock(NamedTuple):
    mark: Callable[[], int]
    last: Callable[[], int]


HOST_CLOCK: Final = _HostClock(time.perf_counter_ns, time.perf_counter_ns)


class Event(Protocol):
    """A place in a stream that knows when the device came there; torch.cuda.Event is one."""

    def record(self) -> None:
        """Become the place after all that the current stream was given so far."""

    def query(self) -> bool:
        """Whether the device has come here."""

    def synchronize(self) -> None:
        """Block until the device has come here."""

    def elapsed_time(self, end: Any, /) -> float:
        """Return the milliseconds from here to there; both have been reached."""


class DeviceClock:
    """The clock of one rank's device, used by the rank's thread alone."""

    def __init__(
        self, new_event: Callable[[], Event], host: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self._new = new_event
        self._host = host
        self._free: list[Event] = []
        self._marks: deque[Event] = deque()  # not settled yet
        self._first = 0  # the number of the first of them
        self._base: tuple[Event, int] | None = None  # a settled one, and when it was

    def mark(self) -> int:
        """Put an event into the current stream and return its number."""
        event = self._free.pop() if self._free else self._new()
        if self._base is None:
            event.record()
            self._base = event, self._host()
            event = self._new()
        event.record()
        self._marks.append(event)
        return self._first + len(self._marks) - 1

    def last(self) -> int:
        """Return the number of the last mark, which is made now if there has been none."""
        following = self._first + len(self._marks)
        return following - 1 if following else self.mark()

    def passed(self, number: int) -> bool:
        """Whether the device has come to a mark."""
        return number < self._first or self._marks[number - self._first].query()

    def reach(self, number: int) -> None:
        """Block until the device has come to a mark."""
        if number >= self._first:
            self._marks[number - self._first].synchronize()

    def settle(self, number: int) -> dict[int, int]:
        """Return when the device came to the marks up to this one, by number, but for those that
        were settled before. Blocks until it has come there.
        """
        if number < self._first:
            return {}
        self.reach(number)
        settled: dict[int, int] = {}
        events = []
        while self._first <= number:
            events.append(self._marks.popleft())
            settled[self._first] = self.at(events[-1])
            self._first += 1
        assert self._base is not None
        self._free += [self._base[0], *events[:-1]]
        self._base = events[-1], settled[number]
        return settled

    def at(self, event: Event) -> int:
        """Return when the device came to an event of any stream, which it has."""
        assert self._base is not None
        base, at = self._base
        return at + round(base.elapsed_time(event) * _NS_PER_MS)

    def compare(self) -> Reading:
        """Return how far this clock is ahead of the host's; blocks until the device has no work."""
        from barepp.trace.clock_sync import (
            Reading,  # imports torch, which a plan's reader has no use for
        )

        readings = []
        for _ in range(COMPARISONS):
            number = self.mark()
            event = self._marks[number - self._first]
            event.synchronize()  # the device is idle now: what it is given next, it does at once
            before = self._host()
            event.record()
            event.synchronize()
            after = self._host()
            at = self.at(event)
            readings.append(Reading(at, at - (before + after) // 2, (after - before + 1) // 2))
        return min(readings, key=lambda reading: reading.error)


def clock_of(device: torch.device | None) -> Clock:
    """Return the clock of what a device does; None is the CPU."""
    if device is None or device.type != "cuda":
        return HOST_CLOCK
    import torch

    return DeviceClock(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]


def took_s(clock: Clock, work: Callable[[], object]) -> float:
    """Do some work, and return the seconds that the device took for it; blocks until it has."""
    start = clock.mark()
    work()
    end = clock.mark()
    if isinstance(clock, DeviceClock):
        when = clock.settle(end)
        start, end = when[start], when[end]
    return (end - start) / 1e9
