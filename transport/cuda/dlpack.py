"""A tensor over memory that torch did not allocate (DLPack); its lender is told when it is freed.

    tensor_at ── a capsule with a DLManagedTensor ──> torch: a tensor whose storage owns the latter
                 release() <── a finalizer <───────── the last view of that storage is freed

The structure is that of the DLPack specification, version 0 ("dltensor"), which every torch since
1.3 reads. Its deleter only frees it. No Python may run there: a tensor can be freed while an
exception is on its way, which ctypes would lose, and the interpreter crashes. So a finalizer of the
storage's Python object tells the lender. That object lives as long as the storage itself; torch
takes the interpreter's lock to free it, in any thread, and CPython keeps exceptions apart from
finalizers. When the interpreter is being shut down, nothing is done any more.
"""

from __future__ import annotations

import ctypes
import enum
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils import dlpack


class DeviceType(enum.IntEnum):
    """What kind of memory it is, in DLPack's numbers."""

    CPU = 1
    CUDA = 2


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", _DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _Lent(ctypes.Structure):
    """What has to live as long as torch uses the memory."""

    _fields_ = (("managed", _DLManagedTensor), ("shape", ctypes.c_int64))


_UNSIGNED: Final = 1  # kDLUInt
_CAPSULE_NAME: Final = b"dltensor"  # (the capsule points to it, so it has to live for ever)

# Memory that needs neither the interpreter's lock nor the interpreter to be freed.
_new_memory: Final[Any] = ctypes.pythonapi.PyMem_RawMalloc
_new_memory.restype = ctypes.c_void_p
_new_memory.argtypes = (ctypes.c_size_t,)
_free: Final[Any] = ctypes.pythonapi.PyMem_RawFree
_free.restype = None
_free.argtypes = (ctypes.c_void_p,)
_DELETER: Final = ctypes.cast(_free, ctypes.c_void_p).value

_new_capsule: Final[Any] = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def tensor_at(
    address: int, nbytes: int, device: tuple[DeviceType, int], release: Callable[[], None]
) -> torch.Tensor:
    """Return `nbytes` (1 or more) at an address as a uint8 tensor of one dimension.

    `release` is called once, when its storage is freed, in whichever thread does that.
    """
    where = _new_memory(ctypes.sizeof(_Lent))
    if not where:
        raise MemoryError("no memory to describe a tensor in")
    shape, (kind, index) = where + _Lent.shape.offset, device
    body = _DLTensor(address, kind, index, 1, _UNSIGNED, 8, 1, shape, None, 0)
    lent = _Lent.from_address(where)
    lent.managed, lent.shape = _DLManagedTensor(body, None, _DELETER), nbytes
    try:
        tensor = dlpack.from_dlpack(_new_capsule(where, _CAPSULE_NAME, None))
    except BaseException:
        _free(where)
        raise
    weakref.finalize(tensor.untyped_storage(), release).atexit = False
    return tensor
