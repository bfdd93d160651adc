"""Frames on their way out: gathered for the kernel, complete when it has taken them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    import torch

    from transport.errors import TransportError
    from transport.message.work import Work

MAX_GATHER: Final = 64  # buffers in one sendmsg; the kernel's own limit is 1024 (IOV_MAX)

Buffer: TypeAlias = "bytes | memoryview"


class Outgoing:
    """One frame. It keeps the tensors alive whose memory its buffers view."""

    __slots__ = ("buffers", "tensors", "work")

    def __init__(
        self, frame: Sequence[Buffer], tensors: Sequence[torch.Tensor], work: Work | None
    ) -> None:
        self.buffers = deque(memoryview(part) for part in frame)
        self.tensors = tensors
        self.work = work


class OutgoingQueue:
    """What one connection still has to send: `frames`, in order, then `behind`.

    The first of `behind` is a place that is taken: its payload is not in memory yet. All that was
    queued since waits for it.
    """

    def __init__(self) -> None:
        self.frames: deque[Outgoing] = deque()
        self.behind: deque[Outgoing] = deque()

    @property
    def empty(self) -> bool:
        """Whether there is nothing left to send, nor will be."""
        return not self.frames and not self.behind

    def append(
        self, frame: Sequence[Buffer], tensors: Sequence[torch.Tensor], work: Work | None
    ) -> None:
        """Queue a frame, header first; `work` is done when the last byte of it is sent."""
        (self.behind or self.frames).append(Outgoing(frame, tensors, work))

    def take_place(self, work: Work) -> Outgoing:
        """Queue a frame that `fill_place` will give later."""
        place = Outgoing((), (), work)
        self.behind.append(place)
        return place

    def fill_place(
        self, place: Outgoing, frame: Sequence[Buffer], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Give the frame for a place; all up to the next empty one may leave now."""
        place.buffers.extend(memoryview(part) for part in frame)
        place.tensors = tensors
        while self.behind and self.behind[0].buffers:
            self.frames.append(self.behind.popleft())

    def gathered(self) -> Iterator[memoryview]:
        """Yield the buffers that are to be sent next, in one call to the kernel."""
        return itertools.islice((b for frame in self.frames for b in frame.buffers), MAX_GATHER)

    def sent(self, nbytes: int) -> None:
        """Take note of what the kernel took."""
        while self.frames:
            buffers = self.frames[0].buffers
            while buffers and nbytes >= len(buffers[0]):
                nbytes -= len(buffers.popleft())
            if buffers:
                if nbytes:
                    buffers[0] = buffers[0][nbytes:]
                return
            work = self.frames.popleft().work
            if work is not None:
                work.complete()

    def fail(self, error: TransportError) -> None:
        """Fail all that is queued."""
        for queued in (self.frames, self.behind):
            while queued:
                work = queued.popleft().work
                if work is not None:
                    work.fail(error)
