"""The receiver's side of memory of its GPU that a peer writes messages to; see ipc_sender.py."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import weakref
from collections.abc import Sequence

import torch

from transport.cuda.driver import HANDLE_NBYTES
from transport.cuda.ipc_sender import (
    DONE,
    HANDLE,
    OPENED,
    SHOWN,
    SLOTS,
    TABLE_NBYTES,
    Part,
    handle_at,
    retire,
    sweep,
)
from transport.device import Event, Gpu, Memory, Stream
from transport.errors import PeerLost, ProtocolError
from transport.message.gpu_mailbox import loans
from transport.message.specs import MessageSpec, TensorSpec
from transport.message.tensors import tensor_over
from transport.shm.arena import ALIGNMENT, FREE, BorrowedMemory, layout


class _Written:
    """The event that a slot's message is written, until the sender has said that it is."""

    def __init__(self, borrowed: GpuBorrowedMemory, slot: int, event: Event) -> None:
        self._borrowed, self._slot, self._event = borrowed, slot, event

    def wait(self, stream: Stream) -> None:
        """Let what the stream is given from now on come after the sender's copy."""
        if not self._borrowed.is_written(self._slot):
            self._event.wait(stream)

    def synchronize(self) -> None:
        """Block until it is written."""
        if not self._borrowed.is_written(self._slot):
            self._event.synchronize()


class BlockLoan:
    """A message in a block; it is given back when the last tensor over it is freed."""

    def __init__(self, borrowed: GpuBorrowedMemory, part: Part, event: Event, tensors: int) -> None:
        self.in_place = True  # whether it had better be used where it lies
        self.streams: list[Stream] = []
        self.part = part
        self.written = _Written(borrowed, part.slot, event)
        self._borrowed = borrowed
        # Tensors may be freed in several threads, in the midst of anything: each takes one away (a
        # single operation of the interpreter), and who finds none left was the last.
        self._left = [None] * (tensors - 1)

    def used(self, stream: Stream) -> None:
        """Take note that a stream was given work that reads it."""
        if stream not in self.streams:
            self.streams.append(stream)

    def release(self, address: int) -> None:
        """Take note that the tensor at an address is freed."""
        loans.pop(address, None)
        try:
            self._left.pop()
        except IndexError:
            self._borrowed.give_back(self)


class GpuBorrowedMemory(BorrowedMemory):
    """The receiver's side; `pid` is the sender's process, or 0."""

    def __init__(self, fd: int, gpu: Gpu, pid: int) -> None:
        super().__init__(fd)
        self._gpu = gpu
        self._sender_pid = pid
        self._memory: Memory | None = None
        self._shown = False
        self._kept_nbytes = 0
        self._lent_slots: set[int] = set()
        self._written: dict[int, Event] = {}
        self._read: dict[int, Event] = {}

    def show(self) -> None:
        """Allocate the memory, once, and let the sender know; without so much it is not shown."""
        if self._shown or self._nbytes < TABLE_NBYTES:
            return
        self._shown = True
        sweep()
        try:
            self._memory = memory = self._gpu.share(self._nbytes)
        except RuntimeError:
            return
        self._states[HANDLE : HANDLE + HANDLE_NBYTES] = memory.handle
        self._states[SHOWN] = 1
        close = functools.partial(_close_shown, memory, self._states, self._sender_pid)
        weakref.finalize(self, retire, close).atexit = False

    def take_message(
        self, word: int, spec: MessageSpec
    ) -> tuple[Sequence[torch.Tensor], BlockLoan]:
        """Return a message's tensors, those on the GPU over its block, and the loan of that.

        Raises:
            ProtocolError: there is no such block.
            PeerLost: the sender's event cannot be opened, as happens when it has been killed.
        """
        slot = word % ALIGNMENT
        offset, (starts, nbytes) = word - slot, layout(spec)
        part = Part(offset, offset + ALIGNMENT + nbytes, slot)
        over = [each for each in spec.tensors if each.on_gpu and each.nbytes]
        if (
            self._memory is None
            or not over
            or not offset >= TABLE_NBYTES
            or part.end > self._nbytes
            or offset in self._used
            or slot in self._lent_slots
        ):
            raise ProtocolError(f"no block at offset {offset}, slot {slot} that {spec} could be in")
        loan = BlockLoan(self, part, self._event(slot), len(over))
        self._used[offset] = loan.part
        self._lent_slots.add(slot)
        self._kept_nbytes += nbytes
        loan.in_place = 2 * self._kept_nbytes <= self._nbytes and 2 * len(self._lent_slots) <= SLOTS
        payload = offset + ALIGNMENT
        return [
            self._part(payload + start, each, loan)
            for start, each in zip(starts, spec.tensors, strict=True)
        ], loan

    def is_written(self, slot: int) -> bool:
        """Whether the sender has said that it waited for the slot's message to be written."""
        return bool(self._states[DONE + slot])

    def give_back(self, loan: BlockLoan) -> None:
        """Record when it is read, behind all streams that read it, and let the sender have it."""
        if os.getpid() != self._pid:  # (a forked child's copies; see `BorrowedMemory`)
            return
        slot = loan.part.slot
        with contextlib.suppress(RuntimeError):  # a device that has failed gives nothing back
            for stream in loan.streams:  # (those of copies too, when it was sent on: `keep`)
                self._gpu.mark(stream).wait(self._gpu.returns)
            if slot not in self._read:
                self._read[slot], handle = self._gpu.share_event()
                self._states[handle_at(slot, read=True)] = handle
            self._read[slot].record(self._gpu.returns)
            del self._used[loan.part.start]
            self._lent_slots.discard(slot)
            self._kept_nbytes -= loan.part.end - loan.part.start - ALIGNMENT
            self._states[loan.part.start] = FREE

    def _event(self, slot: int) -> Event:
        if slot not in self._written:
            handle = bytes(self._states[handle_at(slot, read=False)])
            try:
                self._written[slot] = self._gpu.open_event(handle)
            except RuntimeError as error:
                raise PeerLost(f"what it has written cannot be waited for: {error}") from error
        return self._written[slot]

    def _part(self, start: int, spec: TensorSpec, loan: BlockLoan) -> torch.Tensor:
        if not spec.nbytes:
            return self._gpu.fresh(spec) if spec.on_gpu else spec.allocate()
        if not spec.on_gpu:  # a few bytes, most of the time: copied, so that only the GPU has a say
            array = (ctypes.c_char * spec.nbytes).from_buffer(self._map, start)
            return tensor_over(array, 0, spec).clone()
        assert self._memory is not None
        address = self._memory.address + start
        loans[address] = loan
        return self._gpu.over(address, spec, functools.partial(loan.release, address))


def _close_shown(memory: Memory, book: memoryview, sender_pid: int) -> bool:
    # CUDA Driver API, cuIpcOpenMemHandle: to free what others have open is undefined.
    if book[OPENED] and _alive(sender_pid):
        return False
    memory.close()
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid > 0
