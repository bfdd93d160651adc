"""One direction of one pair of ranks: a thread that moves one payload after the other, in order.

It is for ways to move memory whose calls block, and which cannot be polled beside sockets: this
thread waits for them, and a rank that waits for the message waits for this thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from transport.sockets.event_loop import Progress


class Group(Protocol):
    """Two ranks that can move memory, from the one to the other only."""

    def move(self, tensor: torch.Tensor, ready: object) -> None:
        """Send the tensor's bytes, or receive into them; block until they may be used again.

        `ready` is what was posted with them. Anything that goes wrong is a RuntimeError.
        """

    def abort(self) -> None:
        """Let a `move` that blocks in another thread end, if there is a way to; never blocks."""


class _Job(NamedTuple):
    tensors: Sequence[torch.Tensor]
    done: Callable[[], None]
    ready: object


class CopyThread:
    """Moves payloads over a group, first in first out; `post` and `end` are called under the lock.

    `on_break` is told, under the lock too, what went wrong; afterwards nothing moves any more.

    No call of a rank ever waits for the thread. One that is inside `Group.move` when its copy
    thread ends stays there until the other side lets go, or until the process ends: it is a daemon.
    """

    def __init__(
        self, name: str, progress: Progress, on_break: Callable[[Exception], None]
    ) -> None:
        self.name = name
        self._progress = progress
        self._on_break = on_break
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._group: Group | None = None
        self._moving = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, group: Group) -> None:
        """Begin to move what is posted."""
        self._group = group
        self._thread.start()

    def post(
        self, tensors: Sequence[torch.Tensor], done: Callable[[], None], ready: object = None
    ) -> None:
        """Move these tensors when all before are moved, then call `done` under the lock."""
        self._jobs.put(_Job([tensor for tensor in tensors if tensor.nbytes], done, ready))

    def end(self) -> None:
        """Move nothing any more; of what was posted and is not done, `done` is never called."""
        if self._ended:
            return
        self._ended = True
        self._jobs.put(None)
        if self._moving and self._group is not None:
            self._group.abort()

    def join(self) -> None:
        """Wait for the end of a thread that moves nothing; not to be called under the lock."""
        if not self._moving and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._move_next():
                pass
        except Exception as error:  # (when it is a bug of ours, `guard` has told and all has ended)
            with self._progress.lock, self._progress.guard:
                if not self._ended:
                    self._on_break(error)
                    self._progress.wake()
        finally:
            self._group, self._jobs = None, queue.SimpleQueue()  # lets go of all that was posted

    def _move_next(self) -> bool:
        # (A method of its own, so that no local variable keeps a tensor while nothing is posted.)
        job, group = self._jobs.get(), self._group
        with self._progress.lock:
            if self._ended or job is None or group is None:
                return False
            self._moving = True
        for tensor in job.tensors:
            group.move(tensor, job.ready)
        with self._progress.lock, self._progress.guard:
            self._moving = False
            if not self._ended:
                job.done()
                self._progress.wake()
        return True
