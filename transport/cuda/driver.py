"""CUDA memory that processes share, by the driver's own calls: allocated, shown, opened, copied to.

torch's allocator gives no memory that can be shown for good: it uses freed blocks again, and what
it maps in expandable segments cannot be shown at all. So this is cuMemAlloc's, and torch never
knows more of it than an address. (CUDA Driver API: "Memory Management", "Primary Context".)

Not yet run on hardware.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

HANDLE_NBYTES: Final = 64  # CU_IPC_HANDLE_SIZE
_LAZY_ENABLE_PEER_ACCESS: Final = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_LIBRARY: Final = "libcuda.so.1"

_exported: weakref.WeakValueDictionary[bytes, Memory] = weakref.WeakValueDictionary()


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_NBYTES),)


_POINTER: Final = ctypes.c_uint64  # CUdeviceptr
_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(ctypes.c_void_p),),
    "cuMemAlloc_v2": (ctypes.POINTER(_POINTER), ctypes.c_size_t),
    "cuMemFree_v2": (_POINTER,),
    "cuMemcpyAsync": (_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_void_p),
    "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _POINTER),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_POINTER), _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_POINTER,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    for name, arguments in _PROTOTYPES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


def why_not() -> str | None:
    """Return why the driver cannot be called, None when it can; initialises nothing."""
    try:
        _library()
    except (OSError, AttributeError) as error:
        return f"CUDA's driver cannot be called: {error}"
    return None


def _call(name: str, *arguments: Any) -> None:
    """Make a call: the one gate by which the driver's errors come in.

    Raises:
        RuntimeError: the call failed; as torch's own, for `gpu.gate`.
    """
    result = getattr(_library(), name)(*arguments)
    if result != 0:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(result, ctypes.byref(text))
        said = (text.value or b"an error that it has no words for").decode(errors="replace")
        raise RuntimeError(f"CUDA error: {said} ({name} gave {result})")


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """Return a device's primary context, which is torch's too; kept until the process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


@contextmanager
def _within(index: int) -> Iterator[None]:
    _call("cuCtxPushCurrent_v2", _context(index))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class Memory:
    """Memory of a GPU that several processes use: `allocate`d in one, `open_memory`'d in others."""

    def __init__(self, index: int, address: int, handle: bytes, *, ours: bool) -> None:
        self.address = address
        self.handle = handle
        self._index = index
        self._free = "cuMemFree_v2" if ours else "cuIpcCloseMemHandle"
        self._pid = os.getpid()

    def close(self) -> None:
        """Give it back; a second call does nothing, nor does one in a forked child."""
        if self.address and os.getpid() == self._pid:
            address, self.address = self.address, 0
            with suppress(RuntimeError), _within(self._index):  # (of a device that has failed)
                _call(self._free, address)


class Alias:
    """Memory that this very process had allocated: CUDA refuses to open its handle here."""

    def __init__(self, memory: Memory) -> None:
        self.address, self.handle = memory.address, memory.handle
        self._memory: Memory | None = memory

    def close(self) -> None:
        """Let go of it."""
        self._memory = None


def allocate(index: int, nbytes: int) -> Memory:
    """Return new memory of a device, with a handle by which other processes can open it.

    Raises:
        RuntimeError: there is not so much, or it cannot be shown.
    """
    address, handle = _POINTER(), _Handle()
    with _within(index):
        _call("cuMemAlloc_v2", ctypes.byref(address), nbytes)
        try:
            _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        except RuntimeError:
            _call("cuMemFree_v2", address)
            raise
    memory = Memory(index, address.value, bytes(handle), ours=True)
    _exported[memory.handle] = memory
    return memory


def open_memory(index: int, handle: bytes) -> Memory | Alias:
    """Return the memory that a handle is for, reachable from a device of this process.

    Raises:
        RuntimeError: it cannot be opened here: another container, GPUs without peer access, ...
    """
    mine = _exported.get(handle)
    if mine is not None:
        return Alias(mine)
    address, shown = _POINTER(), _Handle.from_buffer_copy(handle)
    with _within(index):
        flags = _LAZY_ENABLE_PEER_ACCESS
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), shown, flags)
    return Memory(index, address.value, handle, ours=False)


def copy(index: int, to: int, source: int, nbytes: int, stream: int) -> None:
    """Give a stream the copy of bytes between two addresses, of whichever devices.

    Raises:
        RuntimeError: it, or anything before it, failed.
    """
    with _within(index):
        _call("cuMemcpyAsync", to, source, nbytes, stream)
