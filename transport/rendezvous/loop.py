"""The event loop of a launcher: calls back when a descriptor is readable, or at a time.

1. Descriptors come before times: what had arrived when a deadline was reached is read first. So a
   launcher that was stopped for a while does not mistake unread signs of life for silence.
2. A call has one time. `call_at` with the same function and arguments replaces it; None cancels it.
3. A callback may register, unregister and call off anything, itself included.
4. One thread uses the loop. Only `wake` may be called from other threads and signal handlers.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable, Hashable


class EventLoop:
    """Waits for descriptors and times; see the rules at the top of the file."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._times: dict[tuple[Callable[..., object], tuple[Hashable, ...]], float] = {}
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.register(self._wakeup, lambda: os.eventfd_read(self._wakeup))

    def register(self, fd: int, callback: Callable[[], object]) -> None:
        """Call back whenever the descriptor is readable or at its end; once for each turn."""
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def await_room(self, fd: int, wanted: bool) -> None:
        """Whether to call back for a registered descriptor also when it can be written to."""
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def unregister(self, fd: int) -> None:
        """Forget a descriptor, if it is registered, before it is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_at(
        self, when: float | None, callback: Callable[..., object], *arguments: Hashable
    ) -> None:
        """Call back once at a time of `time.monotonic()`; 0 is at the end of this turn."""
        if when is None:
            self._times.pop((callback, arguments), None)
        else:
            self._times[callback, arguments] = when

    def next_time(self) -> float:
        """Return when the next call is due; infinity when none is."""
        return min(self._times.values(), default=math.inf)

    def wake(self) -> None:
        """End the current wait, from another thread or a signal handler."""
        os.eventfd_write(self._wakeup, 1)

    def turn(self, until: float = math.inf) -> None:
        """Wait for something to happen, until a time at most, then make all calls that are due."""
        left = min(self.next_time(), until) - time.monotonic()
        self._epoll.poll(None if math.isinf(left) else max(0.0, left))
        now = time.monotonic()
        most = max(1, len(self._callbacks))
        ready = [(fd, self._callbacks[fd]) for fd, _ in self._epoll.poll(0, most)]
        for fd, callback in ready:
            if self._callbacks.get(fd) is callback:
                callback()
        for call in sorted(self._times, key=lambda call: self._times[call]):
            if self._times.get(call, math.inf) <= now:
                del self._times[call]
                callback, arguments = call
                callback(*arguments)

    def close(self) -> None:
        """Close the loop's own descriptors, no others."""
        self._epoll.close()
        os.close(self._wakeup)
