"""Memory of large messages that were received, kept warm for the next ones.

The C library gives a block of 32 MiB or more straight back to the kernel when it is freed, whatever
it is told (mallopt(3): M_MMAP_THRESHOLD has that maximum). So each new one is touched for the first
time, page by page, which takes several times as long as to receive into it.

A block comes back when the *storage* of the tensor over it is freed, however many views there were,
as lent memory does (arena.py). Such a tensor cannot be resized in place.
"""

from __future__ import annotations

import mmap
import weakref
from typing import Final

import torch

from transport.message.specs import MessageSpec, TensorSpec
from transport.message.tensors import bytes_type, tensor_over

POOLED_NBYTES: Final = 32 * 1024 * 1024  # of one tensor; malloc keeps what is smaller
IDLE_NBYTES: Final = 256 * 1024 * 1024  # a bound on what is kept and not in use


class Pool:
    """Blocks of memory by size. They are taken and come back in any thread, without a lock.

    (Each step on the dictionary or a list is one operation of the interpreter. A block may come
    back in the midst of any other step, when the garbage collector finds its last tensor.)
    """

    def __init__(self, idle_nbytes: int = IDLE_NBYTES) -> None:
        self._idle_limit = idle_nbytes
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._closed = False

    @property
    def idle_nbytes(self) -> int:
        """Bytes of the blocks that nobody uses now."""
        return sum(nbytes * len(blocks) for nbytes, blocks in list(self._idle.items()))

    def allocate(self, spec: MessageSpec) -> list[torch.Tensor]:
        """Return tensors for a message, as `MessageSpec.allocate` does, large ones in a block."""
        if spec.nbytes < POOLED_NBYTES:
            return spec.allocate()
        return [self._tensor(each) for each in spec.tensors]

    def close(self) -> None:
        """Give everything back to the kernel, now or when its tensors are freed."""
        self._closed = True
        self._idle.clear()

    def _tensor(self, spec: TensorSpec) -> torch.Tensor:
        nbytes = spec.nbytes
        if nbytes < POOLED_NBYTES:
            return spec.allocate()
        try:
            block = self._idle[nbytes].pop()
        except (KeyError, IndexError):
            try:
                block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError:
                return spec.allocate()  # torch's allocator says how much it cannot give
        # The tensor's storage keeps this array alive, and the array keeps the map.
        array = bytes_type(nbytes).from_buffer(block)
        weakref.finalize(array, self._give_back, block).atexit = False
        return tensor_over(array, 0, spec)

    def _give_back(self, block: mmap.mmap) -> None:
        nbytes = len(block)
        if nbytes > self._idle_limit:
            return
        if self.idle_nbytes + nbytes > self._idle_limit:
            self._idle.clear()  # whatever the program received before: it wants other sizes now
        self._idle.setdefault(nbytes, []).append(block)
        if self._closed:  # asked last: it may have been closed since this block came back
            self._idle.clear()
