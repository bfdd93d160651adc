"""Memory that one rank lends to another: the payload is written once, and used where it lies.

    lender                       one file without a name          borrower
    lend: copies the payload     ┌───┬─────────┬───┬───────┐      take(offset): tensors over it;
    there, gives its offset ───> │ 1 │ payload │ 0 │  free │ <─── their storage freed: state = 0
                                 └───┴─────────┴───┴───────┘
                                 64-byte heads, whose first byte is the state: 1 lent, 0 free

1. Only the lender sets a state to 1, and only when it is 0. Only the borrower sets it back to 0,
   once no tensor uses the payload any more: then its *storage* is freed, however many views there
   were. So nobody ever writes what the other one still reads.
2. To lend never waits. When no block is free the answer is None, and the payload travels otherwise.
3. The file has no name (memfd_create(2)): the kernel frees it with the last process that maps it,
   however those end. It is sealed against growing and shrinking before it is shown to anybody, so
   no peer can cut it under a reader (a read behind the end of a file would be a SIGBUS).
4. What comes from the other side, an offset, is checked before it is used.
5. A block of the same size that was used is used again before a new one is: first touching memory
   costs far more than copying to it. Sizes are rounded up by at most a quarter, so that blocks fit
   again. Once all is cut, larger ones serve too; then what lies between lent blocks is cut anew.
6. The borrower says in a byte of the first head what it wants (`wish`). It is 0 until it has mapped
   the arena, which it may not be able to; and a payload that is awaited only to be copied out would
   better come over the stream, which copies with both processes at once.
7. A child that is forked shares what its parent holds: writes of either show in both, and a block
   comes back when the parent has freed it. Clone before the fork what the child is to keep.

That a byte is written after the payload was read, and read before it is written again, is ordered
by the system call in between on one side and by the interpreter's lock on the other.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Final

import torch

from transport.errors import ProtocolError
from transport.message.specs import MessageSpec
from transport.message.tensors import bytes_type, tensor_over

ARENA_NBYTES: Final = 256 * 1024 * 1024  # a bound: memory that is never touched is never there
ALIGNMENT: Final = 64  # of every tensor; also the length of a block's head
MIN_BLOCK_NBYTES: Final = 4096
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
FREE: Final = 0
LENT: Final = 1
_WISH: Final = 1  # where the borrower's wish stands
_LEND: Final = 1
_STREAM: Final = 2
_SHORT_OF: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@functools.lru_cache(maxsize=64)
def layout(spec: MessageSpec) -> tuple[tuple[int, ...], int]:
    """Return where in a block each tensor of a message starts, and how long they are together."""
    starts, end = [], 0
    for tensor in spec.tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(starts), end


def rounded(nbytes: int) -> int:
    """Return the block size for `nbytes`: a multiple of an eighth of the next power of two."""
    step = max(MIN_BLOCK_NBYTES, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


class LendingArena:
    """An arena of this rank, from which it lends blocks to one peer.

    The first `reserved_nbytes` are never lent, so there is room for what else the two have to say.
    `fd` is for showing it; the map has a descriptor of its own (Python before 3.13 duplicates it).

    Raises:
        OSError: the system gives no such memory.
    """

    def __init__(self, nbytes: int = ARENA_NBYTES, reserved_nbytes: int = 0) -> None:
        self.nbytes = nbytes
        self._reserved_nbytes = reserved_nbytes
        self.fd = os.memfd_create("barepp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, nbytes)
        except BaseException:
            self.close()
            raise
        self._states = memoryview(self._map)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._blocks: dict[int, list[int]] = {}  # offsets by size
        # From where to where nothing has been cut into blocks.
        self._gaps = [(reserved_nbytes, nbytes)]
        self._last = 0  # the block that was lent last

    def close(self) -> None:
        """Close `fd`; the memory stays as long as somebody maps it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def wanted(self, *, stream_busy: bool) -> bool:
        """Whether the borrower has mapped this arena, and the next payload had better be lent."""
        wish = self._states[_WISH]
        if wish != _STREAM:
            return wish == _LEND
        # One that is behind does not wait for this payload, so the stream would gain nothing.
        return stream_busy or self._states[self._last] == LENT

    def lend(self, spec: MessageSpec, tensors: Sequence[torch.Tensor]) -> int | None:
        """Copy a message's contiguous tensors into a free block; return its offset, or None."""
        starts, nbytes = layout(spec)
        offset = self._free_block(rounded(nbytes))
        if offset is None:
            return None
        payload = self._base + offset + ALIGNMENT
        for start, tensor in zip(starts, tensors, strict=True):
            ctypes.memmove(payload + start, tensor.data_ptr(), tensor.nbytes)
        self._states[offset] = LENT
        self._last = offset
        return offset

    def _free_block(self, size: int) -> int | None:
        offset = self._unused(size)
        if offset is None:
            offset = self._cut(size)
        if offset is None:
            larger = (self._unused(other) for other in sorted(self._blocks) if other > size)
            offset = next((found for found in larger if found is not None), None)
        if offset is None:
            self._forget_free_blocks()
            offset = self._cut(size)
        return offset

    def _unused(self, size: int) -> int | None:
        """Return a free block of this very size."""
        for offset in self._blocks.get(size, ()):
            if self._states[offset] == FREE:
                return offset
        return None

    def _cut(self, size: int) -> int | None:
        """Return a new block, cut from a gap."""
        for i, (start, stop) in enumerate(self._gaps):
            if stop - start >= ALIGNMENT + size:
                self._gaps[i] = (start + ALIGNMENT + size, stop)
                self._states[start] = FREE  # (old payload may lie there)
                self._blocks.setdefault(size, []).append(start)
                return start
        return None

    def _forget_free_blocks(self) -> None:
        """Make one gap of all that lies between two blocks that are lent."""
        lent = sorted(
            (offset, size)
            for size, offsets in self._blocks.items()
            for offset in offsets
            if self._states[offset] == LENT
        )
        self._blocks, self._gaps, self._last, end = {}, [], 0, self._reserved_nbytes
        for offset, size in lent:
            self._blocks.setdefault(size, []).append(offset)
            self._gaps.append((end, offset))
            end = offset + ALIGNMENT + size
        self._gaps.append((end, self.nbytes))


class BorrowedMemory:
    """A peer's arena, seen from the side that uses the payloads; closes `fd`.

    Raises:
        ProtocolError: the descriptor is not a sealed file of a length that was agreed upon.
        OSError: this process is out of descriptors or memory; then nothing is lent to it.
    """

    def __init__(self, fd: int, limit_nbytes: int = ARENA_NBYTES) -> None:
        try:
            nbytes = os.fstat(fd).st_size
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ProtocolError("the lent memory is not sealed: it could shrink under a reader")
            if not ALIGNMENT <= nbytes <= limit_nbytes:  # one head, to write the wish into
                raise ProtocolError(f"{nbytes} bytes of lent memory, at most {limit_nbytes} agreed")
            self._map = mmap.mmap(fd, nbytes)
        except OSError as error:
            if error.errno in _SHORT_OF:
                raise
            raise ProtocolError(f"the lent memory cannot be mapped: {error.strerror}") from error
        finally:
            os.close(fd)
        self._nbytes = nbytes
        self._states = memoryview(self._map)
        self._used: dict[int, object] = {}  # what lies at an offset
        self._pid = os.getpid()
        self.wish(lent=True)

    def wish(self, *, lent: bool) -> None:
        """Say whether the next payloads had better be lent, or come over the stream."""
        self._states[_WISH] = _LEND if lent else _STREAM

    def take(self, offset: int, spec: MessageSpec) -> list[torch.Tensor]:
        """Return a message's tensors over the block at `offset`; they may be written to.

        Raises:
            ProtocolError: there is no such block.
        """
        starts, nbytes = layout(spec)
        if offset % ALIGNMENT or offset + ALIGNMENT + nbytes > self._nbytes or offset in self._used:
            raise ProtocolError(f"no block at offset {offset} that {spec} could lie in")
        # Every tensor's storage keeps this array alive, and the array keeps the map.
        array = bytes_type(max(1, nbytes)).from_buffer(self._map, offset + ALIGNMENT)
        self._used[offset] = weakref.ref(array, functools.partial(self._give_back, offset))
        parts = zip(starts, spec.tensors, strict=True)
        return [tensor_over(array, start, each) for start, each in parts]

    def _give_back(self, offset: int, _: object) -> None:
        # A forked child frees its copies of the tensors as well; the block is not its to give.
        if os.getpid() == self._pid:
            del self._used[offset]
            self._states[offset] = FREE
