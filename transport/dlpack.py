"""A tensor over memory that torch did not allocate (DLPack); its lender is told when it is freed.

    tensor_at ── a capsule with a DLManagedTensor ──> torch: a tensor whose storage owns the latter
                 release() <── its deleter <───────── the last view of that storage is freed

The deleter comes in any thread, with or without the interpreter's lock (ctypes takes it), and may
come when the interpreter is being shut down: then nothing is done any more. The structure is that
of the DLPack specification, version 0 ("dltensor"), which every torch since 1.3 reads.
"""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from typing import Any, Final, NamedTuple

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
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", _DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", _Deleter),
    )


class _Lent(NamedTuple):
    """What has to live as long as torch uses the memory."""

    managed: _DLManagedTensor
    shape: ctypes.Array[ctypes.c_int64]
    release: Callable[[], None]


_UNSIGNED: Final = 1  # kDLUInt
_CAPSULE_NAME: Final = b"dltensor"  # (the capsule points to it, so it has to live for ever)
_lent: Final[dict[int, _Lent]] = {}


# Default values, because a module's names may be gone when the last tensors are freed.
def _delete(
    address: int,
    take: Callable[[int], _Lent] = _lent.pop,
    ending: Callable[[], bool] = sys.is_finalizing,
) -> None:
    if not ending():
        take(address).release()


_deleter: Final = _Deleter(_delete)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_deleter))  # torch may call it after this module's end

_new_capsule: Final[Any] = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def tensor_at(
    address: int, nbytes: int, device: tuple[DeviceType, int], release: Callable[[], None]
) -> torch.Tensor:
    """Return `nbytes` (1 or more) at an address as a uint8 tensor of one dimension.

    `release` is called once, when its storage is freed, in whichever thread does that.
    """
    shape = (ctypes.c_int64 * 1)(nbytes)
    kind, index = device
    body = _DLTensor(address, kind, index, 1, _UNSIGNED, 8, 1, shape, None, 0)
    managed = _DLManagedTensor(body, None, _deleter)
    key = ctypes.addressof(managed)
    _lent[key] = _Lent(managed, shape, release)
    try:
        return dlpack.from_dlpack(_new_capsule(key, _CAPSULE_NAME, None))
    except BaseException:
        del _lent[key]
        raise
