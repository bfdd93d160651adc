"""The only place where a tensor becomes bytes and back; no numpy, no pickle.

    prepare   message ──> spec and contiguous tensors     what the sender checks
    memory    tensor  ──> a view of its bytes             what the kernel reads from and writes to
    fillable  `into`  ──> spec                            what the receiver checks

1. A message is one tensor or a tuple of them. Its payload is the tensors' bytes in that order,
   C-contiguous, little-endian, without padding; dtypes and shapes are metadata (specs.py).
2. A contiguous tensor is sent from its own memory and received into its own memory, without a copy.
   Any other tensor is copied once.
3. Any thread may write the bytes: the tensor must not depend on that thread's autograd or inference
   mode.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from transport.errors import InvalidArgument
from transport.message.specs import (
    DTYPES,
    MAX_TENSORS,
    NAMES,
    Message,
    MessageSpec,
    TensorSpec,
    _single,
    _tuple,
)

if TYPE_CHECKING:
    from transport.device import Gpu


def prepare(message: Message, gpu: Gpu | None = None) -> tuple[MessageSpec, list[torch.Tensor]]:
    """Check that `message` can be sent; return its spec and its tensors, contiguous.

    A contiguous tensor is returned as it is (its memory is what gets sent), any other is copied.
    `gpu` is the one whose tensors can be sent as well.

    Raises:
        InvalidArgument: not a dense CPU tensor, or a tuple of them, of a dtype of `DTYPES`.
    """
    if isinstance(message, torch.Tensor):
        tensor = _sendable(message, gpu)
        if gpu is None:
            return _single(tensor.dtype, tensor.shape), [tensor]
        return _single(tensor.dtype, tensor.shape, gpu.holds(tensor)), [tensor]
    if not isinstance(message, tuple) or len(message) > MAX_TENSORS:
        raise InvalidArgument(
            f"a message is a torch.Tensor or a tuple of at most {MAX_TENSORS} of them, "
            f"not {type(message).__name__}"
        )
    tensors = [_sendable(tensor, gpu) for tensor in message]
    forms = ((t.dtype, t.shape, gpu is not None and gpu.holds(t)) for t in tensors)
    return _tuple(*forms), tensors


def _sendable(tensor: object, gpu: Gpu | None) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise InvalidArgument(f"only tensors can be sent, not {type(tensor).__name__}")
    if tensor.dtype not in NAMES or tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise InvalidArgument(
            f"a {layout} tensor of {tensor.dtype} cannot be sent; "
            f"dense tensors of these can: {', '.join(DTYPES)}"
        )
    if not tensor.is_cpu and not (gpu is not None and gpu.holds(tensor)):
        moved = "CPU tensors" if gpu is None else f"tensors of {gpu.device} and of the CPU"
        raise InvalidArgument(
            f"this transport moves {moved}, this one is on {tensor.device}: send tensor.cpu()"
        )
    # The conjugate and negative bits are lazy flags; the bytes in memory do not know of them.
    if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():
        # Cut off its graph, which a slow peer would otherwise keep alive with it.
        return tensor.detach() if tensor.requires_grad else tensor
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def fillable(message: Message, gpu: Gpu | None = None) -> MessageSpec:
    """Check that a receive may write into `message`; return its spec.

    Raises:
        InvalidArgument: not a message, on another device, not contiguous, or needs a gradient.
    """
    if isinstance(message, torch.Tensor) and _sendable(message, gpu) is message:  # the usual case
        return _single(message.dtype, message.shape)
    spec, ready = prepare(message, gpu)
    for tensor, prepared in zip(tensors_of(message), ready, strict=True):
        if prepared is tensor:
            continue
        if tensor.requires_grad:
            raise InvalidArgument("a tensor to be filled cannot require a gradient: use .detach()")
        raise InvalidArgument("a tensor to be filled has to be contiguous: use .contiguous()")
    return spec


def tensors_of(message: Message) -> Sequence[torch.Tensor]:
    """Return a message's tensors in order."""
    return (message,) if isinstance(message, torch.Tensor) else message


# ctypes forgets an array type with its last instance, and making one takes 5 us.
@functools.lru_cache(maxsize=1024)
def bytes_type(nbytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    """Return ctypes' type of an array of bytes."""
    return ctypes.c_char * nbytes


def memory(tensor: torch.Tensor) -> memoryview:
    """Return a writable view of the bytes of a contiguous CPU tensor.

    The view does not keep the tensor alive: whoever holds the view holds the tensor too.
    """
    nbytes = tensor.nbytes
    return _view(tensor.data_ptr(), nbytes) if nbytes else memoryview(bytearray())


@functools.lru_cache(maxsize=1024)  # a program's tensors lie at the same few places
def _view(address: int, nbytes: int) -> memoryview:
    return memoryview(bytes_type(nbytes).from_address(address)).cast("B")


def tensor_over(array: ctypes.Array[ctypes.c_char], start: int, spec: TensorSpec) -> torch.Tensor:
    """Return a tensor over part of an array, which its storage keeps alive."""
    if not spec.nbytes:
        return spec.allocate()
    count = spec.nbytes // spec.dtype.itemsize
    # (As in `allocate`: no mode of the thread that moves the bytes may show.)
    with torch.inference_mode(mode=False), torch.enable_grad():
        flat = torch.frombuffer(array, dtype=spec.dtype, count=count, offset=start)
        return flat.view(spec.shape).detach()


def fill(tensors: Sequence[torch.Tensor], payload: memoryview) -> None:
    """Copy a payload into the contiguous CPU tensors that it belongs to."""
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        memory(tensor)[:] = payload[start:end]
        start = end


def overwrite(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy the bytes of one contiguous CPU tensor over another's of the same spec.

    As when the kernel writes there, neither autograd nor a thread's inference mode has a say.
    """
    ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)


def copied_bytes(tensor: torch.Tensor) -> bytes:
    """Return a copy of the bytes of a contiguous CPU tensor."""
    return memory(tensor).tobytes()


def payload_sum(tensors: Sequence[torch.Tensor]) -> int:
    """Return the sum, modulo 2**64, of a payload's bytes read as 64-bit integers.

    Every single flipped bit changes it. torch adds at the speed of memory, several times faster
    than a CRC. (What is left over at a tensor's end counts as one shorter integer.)
    """
    total = 0
    for tensor in tensors:
        data = memory(tensor)
        words = len(data) // 8
        if words:
            total += int(torch.frombuffer(data, dtype=torch.int64, count=words).sum())
        total += int.from_bytes(data[8 * words :], "little")
    return total % 2**64


def unsupported_host() -> str | None:
    """Return why this machine cannot take part: the payload is little-endian as it stands."""
    return None if sys.byteorder == "little" else "tensors travel little-endian, this host is not"
