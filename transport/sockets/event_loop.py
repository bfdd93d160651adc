"""Who moves the bytes: a thread that waits does it itself, a background thread does it otherwise.

    background thread ── sleeps on ──> outer epoll ── watches ──> inner epoll ──> all sockets
    a waiting thread ─── sleeps on ─────────────────────────────> inner epoll

1. The one lock guards every handler and all of the transport's state. It is never held while a
   thread sleeps.
2. A thread that waits becomes the driver: it disarms the inner epoll within the outer one (one
   system call, nobody is woken), then polls the inner one directly. What it waits for is handled
   in its own thread, without a hand-off: a hand-off between two threads costs tens of microseconds.
3. When it is done it arms the outer epoll again, under the lock that it handled the last events
   with. The background thread wakes only when bytes arrive while nobody waits, that is while the
   rank computes; and it leaves them to a driver that comes back within `RETURN_S`. (Most do: it
   would take the interpreter's lock from a thread that computes, only to do what that one does
   anyway; or begin to receive a message before its receiver has named the memory for it.)
4. A second thread that waits meanwhile is a follower: the driver notifies it after each round.
5. Nothing that goes wrong is lost in a thread: an exception that a handler does not expect, or an
   interrupt in the midst of one, leaves a half-done state, so `on_crash` is told and ends it all.
   What was in hand just then may be on nobody's list any more; its waiter is failed all the same.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final

from transport.errors import DeviceError, TransportError
from transport.message.work import Work, deadline_after, remaining

DRIVER_GRACE_S: Final = 0.01  # timers that are due are the driver's while there is one

RETURN_S: Final = 0.005  # for a driver to come back: short beside the time that many bytes take

Handler = Callable[[int], None]  # is given the epoll event mask, under the lock


class Guard:
    """A `with` block's end by anything but a `TransportError` is reported as a crash.

    So is a `DeviceError`: after most errors of a GPU its process can use it no more.
    """

    def __init__(self, on_crash: Callable[[BaseException], None]) -> None:
        self._on_crash = on_crash

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and (
            not isinstance(error, TransportError) or isinstance(error, DeviceError)
        ):
            self._on_crash(error)


class Progress:
    """The event loop of one rank's transport.

    Whoever changes anything that handlers use does it within `with progress.lock, progress.guard:`.
    """

    def __init__(
        self,
        name: str,
        on_crash: Callable[[BaseException], None],
        on_drive: Callable[[], None] = lambda: None,
    ) -> None:
        self.lock = threading.Lock()
        self.guard = Guard(on_crash)
        self.on_crash = on_crash  # called under the lock, as is
        self._on_drive = on_drive  # when a thread begins to drive
        self._changed = threading.Condition(self.lock)
        self._stopping = threading.Condition(self.lock)  # ends a wait for a driver to come back
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_number = itertools.count()
        self.driver: int | None = None  # the thread that polls for itself now
        self._drives = 0  # how often some thread became the driver
        self._followers = 0
        self._sleeps_until = math.inf  # when the background thread, if asleep, wakes by itself
        self._stopped = False
        self._ended: TransportError | None = None  # what all who still wait are to raise
        self._inner = select.epoll()
        self._outer = select.epoll()
        self._outer.register(self._inner, select.EPOLLIN)
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.register(self._wakeup, select.EPOLLIN, self._on_wakeup)
        self._thread = threading.Thread(target=self._background, name=name, daemon=True)
        self._thread.start()

    def register(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler` under the lock whenever one of the epoll `events` is there."""
        self._handlers[fd] = handler
        self._inner.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Watch a registered descriptor for other events from now on."""
        self._inner.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget a descriptor; one that is not registered is fine."""
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._inner.unregister(fd)

    def call_at(self, deadline: float, callback: Callable[[], None]) -> None:
        """Call back under the lock once `time.monotonic()` has reached `deadline`."""
        heapq.heappush(self._timers, (deadline, next(self._timer_number), callback))
        self.wake()

    def call_after(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back under the lock when so many seconds are over."""
        self.call_at(time.monotonic() + seconds, callback)

    def wake(self) -> None:
        """Make whoever polls look again: timers, or work that another thread has completed."""
        if self._followers:
            self._changed.notify_all()
        if not self._inner.closed:
            os.eventfd_write(self._wakeup, 1)

    def end(self, error: TransportError) -> None:
        """Fail, from now on, whatever is waited for and not done."""
        self._ended = error
        self.wake()

    def run_until(self, work: Work, timeout: float | None) -> bool:
        """Block until `work.done` and move bytes meanwhile; False when time ran out."""
        deadline = None if timeout is None else deadline_after(timeout)
        me = threading.get_ident()
        while not work.done:
            if deadline is not None and remaining(deadline) == 0.0:
                return False
            try:
                if self._begins_to_drive(me, work, deadline):
                    self._drive(work, deadline)
            finally:
                if self.driver == me:  # an interrupt ended it
                    self._leave()
        return True

    def stop(self) -> None:
        """End the background thread and close the pollers; a second call finds them ended.

        Not to be called under the lock, nor before everything that is waited for is done.
        """
        with self.lock:
            self._stopped = True
            self._stopping.notify_all()
            self.wake()
        self._thread.join()
        with self.lock:
            while self.driver is not None:  # it was woken, and leaves because its work is done
                self._changed.wait()
            if not self._inner.closed:
                self._outer.close()
                self._inner.close()
                os.close(self._wakeup)

    def _begins_to_drive(self, me: int, work: Work, deadline: float | None) -> bool:
        """Become the driver; False after following one that is there, or when the work is done."""
        # The lock is taken by `with` alone: an interrupt (Ctrl-C) strikes between any two other
        # steps, and would leave it locked, or release it in another thread's hands.
        with self.lock:
            self._fail_if_ended(work)
            if work.done:  # since it was looked at without the lock; all may be closed by now
                return False
            if self.driver is not None:
                self._followers += 1
                try:
                    self._changed.wait(remaining(deadline))
                finally:
                    self._followers -= 1
                return False
            self.driver = me
            self._drives += 1
            self._outer.modify(self._inner, 0)
            self._on_drive()
        return True

    def _drive(self, work: Work, deadline: float | None) -> None:
        """Poll and handle until the work is done or the time is over, then give up driving."""
        left = self._until_due(deadline)  # (a timer that comes now comes with a wake-up call)
        while True:
            events = () if work.done else self._inner.poll(left)
            with self.lock:
                self._handle(events)
                self._fail_if_ended(work)
                if not work.done:
                    left = self._until_due(deadline)
                    if left != 0.0 or remaining(deadline) != 0.0:
                        continue
                self._give_up_driving()
                return

    def _fail_if_ended(self, work: Work) -> None:
        if self._ended is not None and not work.done:
            work.fail(self._ended)

    def _give_up_driving(self) -> None:
        self._outer.modify(self._inner, select.EPOLLIN)
        # The background thread may have to end (this thread has read its wake-up call), or sleep
        # for longer than the next timer allows.
        if self._stopped or (self._timers and self._timers[0][0] < self._sleeps_until):
            self.wake()
        if self._followers or self._stopped:
            self._changed.notify_all()  # a follower takes over; `stop` goes on
        self.driver = None

    def _leave(self) -> None:
        """Give up driving, whatever strikes meanwhile: nobody else could drive any more."""
        try:
            with self.lock:
                self._give_up_driving()
        except BaseException:
            self._leave()
            raise

    def _background(self) -> None:
        drives = 0
        while True:
            with self.lock:
                if self._stopped:
                    return
                now = time.monotonic()
                due = self._timers[0][0] if self._timers else math.inf
                grace = 0.0 if self.driver is None else DRIVER_GRACE_S
                self._sleeps_until = max(due, now + grace)
                timeout = max(0.0, self._sleeps_until - now)
            self._outer.poll(None if math.isinf(timeout) else timeout)
            with self.lock:
                if drives != self._drives and not self._stopped:
                    drives = self._drives
                    self._stopping.wait(RETURN_S)
                elif self.driver is None and not self._stopped:
                    self._handle(self._inner.poll(0))

    def _handle(self, events: Sequence[tuple[int, int]]) -> None:
        try:
            for fd, mask in events:
                handler = self._handlers.get(fd)  # an earlier handler may have closed this one
                if handler is not None:
                    handler(mask)
            if self._timers:
                self._call_timers()
        except BaseException as error:
            self.on_crash(error)
            if not isinstance(error, Exception):
                raise  # an interrupt is for the thread that waits here
        finally:
            if self._followers:
                self._changed.notify_all()

    def _call_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def _until_due(self, deadline: float | None) -> float | None:
        """Return the seconds until the deadline or the next timer; None for no limit."""
        timers = self._timers
        if not timers:
            return remaining(deadline)
        due = timers[0][0]
        return remaining(due if deadline is None else min(due, deadline))

    def _on_wakeup(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
