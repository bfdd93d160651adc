"""The sender's side of memory of a receiver's GPU, and the book that both keep of it.

    sender                            book (a file without a name)      receiver
    makes the book                                                      maps it
                                      handle of the memory  <────────── allocates that, once
    opens that, once        ────────> "opened"
    lend: finds a free block,         state of the block: 1
    copies there on `sends`,          handle of the slot's
    records "written"                 event "written"       ──────────> waits for it in a stream
                                      state: 0              <────────── freed: records "read",
    waits for that in `sends` before  handle of the slot's              then the state
    it overwrites any of the block    event "read"

The book is an arena of arena.py: the same blocks, found, lent and given back in the same way. What
lies on the GPU lies at the same place there as it would in the book; CPU tensors of a message of
both kinds lie in the book. So the rules of arena.py hold, and these:

1. The memory is the receiver's own. What it has received stays, however the sender ends; and
   between two GPUs a message is copied once.
2. Nothing waits for a block, a slot, or for the memory to be opened: meanwhile messages are staged.
3. States say what was *given* to the streams, so both sides run ahead of their GPUs; events, of
   which each slot has two, say when it is done. A state is set to 0 after "read" was recorded.
4. A slot's number stands in the frame beside the block's offset, of which the lowest bits are 0.
5. An event is not touched after its maker may be gone: a sender that ends waits until all is
   written, and says so in the book.
6. A receiver that keeps more than half of the memory, or of the slots, copies what comes next.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch

from transport.cuda.driver import HANDLE_NBYTES
from transport.device import Event, Gpu, Memory
from transport.message.gpu_mailbox import keep
from transport.message.specs import MessageSpec
from transport.shm.arena import ALIGNMENT, FREE, LENT, LendingArena, layout, rounded

SLOTS: Final = 64  # messages that are lent at once; their numbers fit below ALIGNMENT
SHOWN: Final = 2  # where the book says that the memory's handle is there
OPENED: Final = 3  # ... that the sender has it open
HANDLE: Final = 64
DONE: Final = HANDLE + HANDLE_NBYTES  # a byte a slot: it is written, no event need be waited for
_EVENTS: Final = DONE + SLOTS  # two handles a slot: "written" and "read"
_ALL_DONE: Final = b"\1" * SLOTS
TABLE_NBYTES: Final = _EVENTS + 2 * SLOTS * HANDLE_NBYTES

_CLOSING: Final = "barepp-ipc-closing"
_retired: Final[list[Callable[[], bool]]] = []  # what could not be closed yet


def retire(close: Callable[[], bool]) -> None:
    """Close something, now or when it is possible."""
    _retired.append(close)
    sweep()


def sweep() -> None:
    """Close what can be closed by now."""
    for _ in range(len(_retired)):
        try:
            close = _retired.pop(0)  # (one operation of the interpreter: it is this thread's now)
        except IndexError:
            return
        if not close():
            _retired.append(close)


def handle_at(slot: int, *, read: bool) -> slice:
    """Return where in the book the handle of a slot's event stands."""
    start = _EVENTS + (2 * slot + read) * HANDLE_NBYTES
    return slice(start, start + HANDLE_NBYTES)


class Part(NamedTuple):
    """A block that was lent for what lies on the GPU; its reader may not be done."""

    start: int
    end: int
    slot: int


class GpuLendingArena(LendingArena):
    """A sender's side: `lend` copies to the receiver's GPU once that has shown its memory."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(reserved_nbytes=TABLE_NBYTES)
        self.refused = ""  # why the receiver's memory cannot be opened
        self.last: Event | None = None  # what the last message was written before
        self._gpu = gpu
        self._memory: Memory | None = None
        self._lent: list[Part] = []  # the oldest first
        self._free_slots = list(range(SLOTS - 1, -1, -1))
        self._written: dict[int, Event] = {}
        self._read: dict[int, Event] = {}

    def finished(self) -> bool:
        """Whether the GPU has written all that was lent; then the book says so."""
        try:
            if self.last is not None and not self.last.query():
                return False
        except RuntimeError:  # the device has failed: it writes nothing any more
            return True
        self._states[DONE:_EVENTS] = _ALL_DONE
        return True

    def lend(self, spec: MessageSpec, tensors: Sequence[torch.Tensor]) -> int | None:
        """Give `sends` the copies of a message to a free block; return its offset and slot."""
        if not spec.on_gpu:
            return super().lend(spec, tensors)
        if not self._opens():
            return None
        starts, nbytes = layout(spec)
        slot = self._take_slot()
        offset = None if slot is None else self._free_block(rounded(nbytes))
        if slot is None or offset is None or self.refused:
            self._free_slots += [] if slot is None else [slot]
            return None
        assert self._memory is not None
        self._lent.append(Part(offset, offset + ALIGNMENT + rounded(nbytes), slot))
        gpu, payload = self._gpu, offset + ALIGNMENT
        gpu.now().wait(gpu.sends)
        for start, tensor, each in zip(starts, tensors, spec.tensors, strict=True):
            if not each.on_gpu:
                ctypes.memmove(self._base + payload + start, tensor.data_ptr(), each.nbytes)
            elif each.nbytes:
                gpu.write(self._memory.address + payload + start, tensor, gpu.sends)
                keep(gpu, tensor, gpu.sends)
        self.last = self._event(slot)
        self.last.record(gpu.sends)
        self._states[DONE + slot] = 0
        self._states[offset] = LENT
        self._last = offset
        return offset | slot

    def end(self) -> None:
        """Lend nothing any more; close the receiver's memory once all is written to it."""
        memory, self._memory = self._memory, None
        self.refused = "it was closed"
        if memory is None:
            return
        if self.finished() or self.last is None:
            _close_opened(memory, None, self._states)
            return
        # It is still written to (this rank ends in an error): somebody else has to wait for that.
        closing = (memory, self.last, self._states)
        threading.Thread(target=_close_opened, args=closing, name=_CLOSING, daemon=True).start()

    def _opens(self) -> bool:
        """Whether the receiver's memory is open, or can be opened now."""
        if self._memory is None and not self.refused and self._states[SHOWN]:
            sweep()
            handle = bytes(self._states[HANDLE : HANDLE + HANDLE_NBYTES])
            try:
                self._memory = self._gpu.open(handle, self.nbytes)
                self._states[OPENED] = 1
            except RuntimeError as error:
                self.refused = str(error)
        return self._memory is not None and not self.refused

    def _event(self, slot: int) -> Event:
        if slot not in self._written:
            event, handle = self._gpu.share_event()
            self._written[slot] = event
            self._states[handle_at(slot, read=False)] = handle
        return self._written[slot]

    def _take_slot(self) -> int | None:
        if not self._free_slots:
            back = next((part for part in self._lent if self._states[part.start] == FREE), None)
            if back is None:
                return None
            self._settle(back)
        return self._free_slots.pop() if self._free_slots else None

    def _free_block(self, size: int) -> int | None:
        """Find a block; what is written there will come after all that was read there."""
        offset = super()._free_block(size)
        if offset is not None:
            end = offset + ALIGNMENT + size
            # (Whatever overlaps a free block has been given back.)
            for part in [p for p in self._lent if p.start < end and offset < p.end]:
                self._settle(part)
        return offset

    def _settle(self, part: Part) -> None:
        """Let `sends` come after the last work that reads what was given back."""
        self._lent.remove(part)
        slot = part.slot
        try:
            if slot not in self._read:
                handle = bytes(self._states[handle_at(slot, read=True)])
                self._read[slot] = self._gpu.open_event(handle)
            self._read[slot].wait(self._gpu.sends)
            self._free_slots.append(slot)
        except RuntimeError as error:  # the receiver is gone, or this device has failed: that shows
            self.refused = str(error)


def _close_opened(memory: Memory, last: Event | None, book: memoryview) -> None:
    with contextlib.suppress(RuntimeError):
        if last is not None:
            last.synchronize()
            book[DONE:_EVENTS] = _ALL_DONE
    memory.close()
    book[OPENED] = 0
    sweep()
