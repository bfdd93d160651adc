"""Tells CUDA's errors from others: they show at whatever call comes next, not where they are."""

from __future__ import annotations

from typing import Final

# What torch's messages have in them ("CUDA error: device-side assert triggered", and so on).
_SIGNS: Final = ("CUDA error", "cuDNN error", "CUBLAS_STATUS_", "CUDA out of memory")
_TYPES: Final = ("AcceleratorError", "OutOfMemoryError")  # of torch; the first since 2.8


def is_from_cuda(error: BaseException) -> bool:
    """Whether an exception is what torch makes of an error of CUDA's."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ in _TYPES or any(sign in str(error) for sign in _SIGNS)
