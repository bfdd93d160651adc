"""Names what CUDA tells late: its errors show at whatever call comes next, not where they are."""

from __future__ import annotations

from typing import Final

from transport.errors import DeviceError

# What torch's messages have in them ("CUDA error: device-side assert triggered", and so on).
_SIGNS: Final = ("CUDA error", "cuDNN error", "CUBLAS_STATUS_", "CUDA out of memory")
_TYPES: Final = ("AcceleratorError", "OutOfMemoryError")  # of torch; the first since 2.8
LATE: Final = (
    "CUDA tells of errors late: the cause may be an earlier action of this step, or anything that "
    "the rank gave its GPU before; CUDA_LAUNCH_BLOCKING=1 in its environment shows which"
)


def is_from_cuda(error: BaseException) -> bool:
    """Whether an exception is what torch makes of an error of CUDA's."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ in _TYPES or any(sign in str(error) for sign in _SIGNS)


def is_late(error: BaseException) -> bool:
    """Whether it is one whose cause may lie before; memory that is not there is told at once."""
    return is_from_cuda(error) and "out of memory" not in str(error)


def device_error(error: RuntimeError, rank: int, doing: str) -> DeviceError:
    """Return the error that says whose GPU it was, and what the rank was about."""
    what = str(error).strip().partition("\n")[0]
    late = f" ({LATE})" if is_late(error) else ""
    return DeviceError(f"rank {rank}'s GPU failed, noticed while {doing}: {what}{late}")
