"""How a rank waits for the others at a barrier, and for anything that a failure may end.

The same for a process, whose calls and releases travel over its control connection, and for a
thread, which shares a lock with the others.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable

from transport.errors import Failure, JobFailed, RendezvousError, TransportClosed, WaitTimeout
from transport.message.work import deadline_after, remaining


class RankControl(abc.ABC):
    """One rank's line to whoever ends its barriers; that one counts `released` and sets `failure`.

    `changed` guards all of it, and is told of every change.
    """

    def __init__(self, rank: int, changed: threading.Condition) -> None:
        self.rank = rank
        self.failure: Failure | None = None
        self.called = self.released = 0  # barriers that this rank has called for, and that are over
        self._timed_out = False  # whether the last call for a barrier did
        self._refused: str | None = None
        self._closed = False
        self._changed = changed

    @abc.abstractmethod
    def call_barrier(self) -> None:
        """Tell that this rank has called for one more barrier."""

    def barrier(self, timeout: float | None = None, *, last: bool = False) -> None:
        """Block until every rank of the world has called.

        A call that timed out has not been taken back: the next one goes on waiting for the same
        barrier. `last` is for the one with which a rank leaves: it waits for such a barrier first,
        then for its own.

        Raises:
            JobFailed: some rank failed, so that it cannot come any more.
            WaitTimeout: it took longer than `timeout` seconds.
        """
        deadline = deadline_after(timeout)
        # Not "is it released?": the release may have come since the call that timed out.
        begun = self._timed_out
        if last and begun:
            self._wait_for_release(deadline, timeout)
        if last or not begun:
            with self._changed:
                self.called += 1
            self.call_barrier()
        self._wait_for_release(deadline, timeout)

    def at_barrier(self) -> bool:
        """Whether a barrier that this rank has called is not over."""
        return self.called > self.released

    def _wait_for_release(self, deadline: float | None, timeout: float | None) -> None:
        due = self.called
        try:
            self._wait(lambda: self.released >= due, remaining(deadline), "waiting at a barrier")
        except WaitTimeout:
            self._timed_out = True
            raise WaitTimeout(f"rank {self.rank}: nothing after {timeout} s at a barrier") from None
        self._timed_out = False

    def _wait(self, ready: Callable[[], bool], timeout: float | None, doing: str) -> None:
        deadline = deadline_after(timeout)
        with self._changed:
            while not ready():
                if self._refused is not None:
                    raise RendezvousError(self._refused)
                if self.failure is not None:
                    raise JobFailed(self.failure, doing)
                if self._closed:
                    raise TransportClosed("this rank has hung up on the rendezvous")
                if remaining(deadline) == 0.0:
                    raise WaitTimeout(f"rank {self.rank}: nothing after {timeout} s of {doing}")
                self._changed.wait(remaining(deadline))
