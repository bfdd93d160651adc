"""GPU tensors over a stream, by way of page-locked memory.

    sender                                              receiver
    isend:   an event of the current stream,            frame: page-locked memory for the payload
             a place in the queue of frames
    thread:  copy to page-locked memory behind the      payload: copy to the GPU on `receives`,
             event, on `sends`; wait for it                      an event; the message is complete
    lock:    the frame goes to its place ──────────>    wait: the current stream waits for the event

The rank's own threads never wait for the GPU: each peer that GPU tensors are sent to has a copy
thread that does. Frames of later messages stay behind the place that is kept. What the receiver
does is in message/gpu_mailbox.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from transport.device import Event, Gpu, gate
from transport.message.specs import MessageSpec, TensorSpec
from transport.sockets.copy_thread import CopyThread
from transport.sockets.event_loop import Progress


class _Leaving(NamedTuple):
    """What a copy thread has to await before it copies tensors, and the copies."""

    after: Event
    copies: list[torch.Tensor]


class Stager:
    """The way of GPU tensors to one peer: copies them to where a socket can take them from."""

    def __init__(self, gpu: Gpu, ranks: tuple[int, int], progress: Progress) -> None:
        self.gpu = gpu
        self.rank, self._peer = ranks
        name = f"barepp-staging-{self.rank}-{self._peer}"
        self._lane = CopyThread(name, progress, progress.on_crash)
        self._started = False

    def post(
        self,
        spec: MessageSpec,
        tensors: Sequence[torch.Tensor],
        fill: Callable[[Sequence[torch.Tensor]], None],
    ) -> None:
        """Copy the parts that are on the GPU, then call `fill`, under the lock, with all parts."""
        with gate(self.rank, f"sending to rank {self._peer}"):
            leaving = _Leaving(self.gpu.now(), [])
        leaves = [each.on_gpu and each.nbytes > 0 for each in spec.tensors]

        def done() -> None:
            copies = iter(leaving.copies)
            fill([next(copies) if leaves[i] else tensors[i] for i in range(len(tensors))])

        if not self._started:
            self._started = True
            self._lane.start(self)
        self._lane.post([t for i, t in enumerate(tensors) if leaves[i]], done, leaving)

    def move(self, tensor: torch.Tensor, ready: object) -> None:
        """Copy a tensor to page-locked memory, and wait for it; called by the copy thread."""
        assert isinstance(ready, _Leaving)
        gpu = self.gpu
        with gate(self.rank, f"sending {TensorSpec.of(tensor)} to rank {self._peer}"):
            ready.after.wait(gpu.sends)
            ready.copies.append(gpu.pinned(TensorSpec.of(tensor)))
            gpu.copy(ready.copies[-1], tensor, gpu.sends)
            gpu.mark(gpu.sends).synchronize()

    def abort(self) -> None:
        """Do nothing: the GPU comes to the copy in any case, or has failed."""

    def end(self) -> None:
        """Copy nothing any more."""
        self._lane.end()

    def join(self) -> None:
        """Wait for the end of the thread, unless it is in the midst of a copy."""
        if self._started:
            self._lane.join()
