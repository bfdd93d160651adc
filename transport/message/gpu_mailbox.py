"""Where each part of a message comes to lie when a rank has a GPU.

1. `into` decides where a part of a message comes to lie; without it the part lies where its sender
   had it, on the receiver's GPU if that has one, else on the CPU.
2. What reads a received tensor waits in its stream (`Landed`). Only what is to lie on the CPU and
   comes from the GPU is waited for by the thread that waits for the message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import torch

from transport.device import Gpu, Loan, Moment, Stream, gate
from transport.errors import DeviceError
from transport.message.mailbox import Arrival, Mailbox
from transport.message.specs import MessageSpec, TensorSpec
from transport.message.tensors import overwrite, tensors_of
from transport.message.work import Receive

loans: Final[dict[int, Loan]] = {}  # by the address of memory that is used in place


def keep(gpu: Gpu, tensor: torch.Tensor, stream: Stream) -> None:
    """Keep memory of a GPU, when it is freed, until a stream has done what it was given so far."""
    loan = loans.get(tensor.untyped_storage().data_ptr())
    if loan is None:
        gpu.used(tensor, stream)
    else:
        loan.used(stream)


class Landed:
    """What a message that is complete still waits for on the GPU; see `work.Ready`."""

    def __init__(self, gpu: Gpu, rank: int, receive: Receive) -> None:
        self.after: Moment | None = None  # the last copy, or what the sender has written
        self.loan: Loan | None = None  # where a part is used in place
        self.fresh: list[torch.Tensor] = []  # what torch may use again once it is freed
        self.late: list[tuple[torch.Tensor, torch.Tensor]] = []  # on the CPU, and what it gets
        self._gpu = gpu
        self._rank = rank
        self._doing = f"receiving from rank {receive.peer} with tag {receive.tag}"
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Let the calling thread's current stream come after the message."""
        with gate(self._rank, self._doing):
            current = self._gpu.current()
            if self.after is not None:
                self.after.wait(current)
            if self.loan is not None:
                self.loan.used(current)
            for tensor in self.fresh:
                self._gpu.used(tensor, current)
            if self.late:
                self._fetch_late()

    def _fetch_late(self) -> None:
        with self._lock:
            if self.late and self.after is not None:
                self.after.synchronize()
            while self.late:
                overwrite(*self.late.pop())


class GpuMailbox(Mailbox):
    """A mailbox whose messages may lie on a GPU, or go there."""

    def __init__(
        self, rank: int, gpu: Gpu, allocate: Callable[[MessageSpec], Sequence[torch.Tensor]]
    ) -> None:
        super().__init__(self._room)
        self._rank = rank
        self._gpu = gpu
        self._allocate_on_cpu = allocate

    def _room(self, spec: MessageSpec) -> Sequence[torch.Tensor]:
        """Return memory that a socket can fill; page-locked where a copy to the GPU follows."""
        if not spec.on_gpu:
            return self._allocate_on_cpu(spec)
        with gate(self._rank, f"making room for {spec}"):
            return [
                self._gpu.pinned(each) if each.on_gpu else each.allocate() for each in spec.tensors
            ]

    def _deliver(self, arrival: Arrival) -> None:
        receive = arrival.receive
        assert receive is not None
        if arrival.error is not None or not (arrival.spec.on_gpu or receive.after is not None):
            super()._deliver(arrival)
            return
        try:
            with gate(self._rank, receive.description):
                self._land(arrival, receive)
        except DeviceError as error:
            receive.fail(error)

    def _land(self, arrival: Arrival, receive: Receive) -> None:
        """Bring each part to its place, and complete the receive."""
        gpu, landed, placed, copies = self._gpu, Landed(self._gpu, self._rank, receive), [], []
        targets = None if receive.into is None else tensors_of(receive.into)
        for i, (source, spec) in enumerate(zip(arrival.tensors, arrival.spec.tensors, strict=True)):
            target = self._place(arrival, i, landed) if targets is None else targets[i]
            placed.append(target)
            if target is source or not spec.nbytes:
                continue
            if gpu.holds(target) or gpu.holds(source):
                copies.append((target, source, spec))
            else:
                overwrite(target, source)
        if copies:
            self._copy(copies, arrival, receive, landed)
        elif arrival.loan is not None:
            landed.after = arrival.loan.written
        receive.ready = landed
        receive.complete(arrival.spec.pack(placed) if receive.into is None else receive.into)

    def _place(self, arrival: Arrival, i: int, landed: Landed) -> torch.Tensor:
        """Return where a part comes to lie whose receiver has not said that."""
        source, spec = arrival.tensors[i], arrival.spec.tensors[i]
        if self._gpu.holds(source):
            if arrival.loan is None:
                landed.fresh.append(source)
                return source
            if arrival.loan.in_place:
                landed.loan = arrival.loan
                return source
        if spec.on_gpu:
            landed.fresh.append(self._gpu.fresh(spec))
            return landed.fresh[-1]
        return source.clone() if arrival.borrowed else source

    def _copy(
        self,
        copies: Sequence[tuple[torch.Tensor, torch.Tensor, TensorSpec]],
        arrival: Arrival,
        receive: Receive,
        landed: Landed,
    ) -> None:
        """Give `receives` the copies to a GPU or from it; `landed` comes after them."""
        gpu = self._gpu
        if arrival.loan is not None:
            arrival.loan.written.wait(gpu.receives)
        if receive.after is not None:
            receive.after.wait(gpu.receives)
        for target, source, spec in copies:
            if gpu.holds(target):  # (whoever gave it may let go of it, and of the work)
                keep(gpu, target, gpu.receives)
            if gpu.holds(source):
                keep(gpu, source, gpu.receives)
            if not gpu.holds(target):
                landed.late.append((target, gpu.pinned(spec)))
                gpu.copy(landed.late[-1][1], source, gpu.receives)
            elif gpu.holds(source) or (spec.on_gpu and not arrival.borrowed):
                gpu.copy(target, source, gpu.receives)
            else:
                # Of memory that is not page-locked the copy would begin here and now, and this
                # thread would wait for all that `receives` has before it.
                pinned = gpu.pinned(spec)
                overwrite(pinned, source)
                gpu.copy(target, pinned, gpu.receives)
        landed.after = gpu.mark(gpu.receives)


class Handed:
    """A message from one rank's GPU to another's, which has still to be copied there.

    Its sender's current stream comes after the copy by `wait`, its receiver's by `written`.
    """

    def __init__(
        self, mine: Gpu, theirs: Gpu | None, spec: MessageSpec, tensors: Sequence[torch.Tensor]
    ) -> None:
        self.in_place = True
        self._mine, self._theirs = mine, theirs
        self.tensors = [tensor.clone() for tensor in tensors if not mine.holds(tensor)]
        mine.now().wait(mine.sends)
        if theirs is not None:  # whose `receives` may have used its fresh memory before
            theirs.mark(theirs.receives).wait(mine.sends)
        for i, (tensor, each) in enumerate(zip(tensors, spec.tensors, strict=True)):
            if each.on_gpu:
                room = mine.pinned(each) if theirs is None else theirs.fresh(each)
                mine.copy(room, tensor, mine.sends)
                keep(mine, tensor, mine.sends)
                self.tensors.insert(i, room)
        self.written = mine.mark(mine.sends)
        if theirs is None:  # who has no GPU cannot wait in a stream of it
            self.written.synchronize()
        self.used(mine.sends)

    def used(self, stream: Stream) -> None:
        """Take note that a stream was given work that uses it."""
        for tensor in self.tensors:
            if self._theirs is not None and self._theirs.holds(tensor):
                self._theirs.used(tensor, stream)

    def wait(self) -> None:
        """Let the sender's current stream come after the copy."""
        self.written.wait(self._mine.current())
