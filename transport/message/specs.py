"""What a message is without its values: its dtypes and shapes, in memory and on the wire.

    MessageSpec ── packed ──> [is_tuple, dtype, shape, dtype, shape, ...]   as msgpack
    MessageSpec <── from_packed ──── e.g. [false, "float32", [8, 128]]

1. Both sides describe a message by the same spec, so two specs are compared, never two tensors.
2. What comes from the network is checked before it is believed: the dtype is one of `DTYPES`, and
   no size is so large that torch cannot count it.
3. The dtype of a tensor that was on a GPU has a mark behind it on the wire: "float32@gpu".
4. A program sends the same few shapes again and again: each is described, packed and read once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from transport.errors import MessageMismatch, ProtocolError

if TYPE_CHECKING:
    from transport.wire.format import Packed

Message: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
# Of one tensor: its dtype, its shape, and whether it was on a GPU.
Form: TypeAlias = "tuple[torch.dtype, tuple[int, ...], bool]"

# What may cross the network; everything else (quantised, sparse, object-like) is refused.
DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
ON_GPU: Final = "@gpu"
MAX_TENSORS: Final = 256  # in one message
MAX_DIMS: Final = 64  # more than any layer uses
_CACHED_META_NBYTES: Final = 256  # longer metadata is read anew each time, so the cache stays small
_INT64_MAX: Final = 2**63 - 1

# Messages within one process never become bytes: hence wire/ is imported where it is used.


def write_meta(is_tuple: bool, forms: Iterable[Form]) -> Packed:
    """Return the metadata of a message of tensors of these forms."""
    from transport.wire.format import pack

    meta: list[object] = [is_tuple]
    for dtype, shape, on_gpu in forms:
        meta += (NAMES[dtype] + ON_GPU if on_gpu else NAMES[dtype], shape)
    return pack(meta)


def read_meta(data: bytes, crc: int) -> tuple[bool, list[Form]]:
    """Return what `write_meta` was given, from its bytes and their CRC-32.

    Raises:
        ProtocolError: it is not a message's metadata.
    """
    from transport.wire.format import check_crc, unpack

    check_crc(data, crc)
    meta = unpack(data)
    if not isinstance(meta, list) or not 1 <= len(meta) <= 1 + 2 * MAX_TENSORS or not len(meta) % 2:
        raise ProtocolError(f"not a message's metadata: {meta!r:.200}")
    is_tuple = meta[0]
    if type(is_tuple) is not bool:
        raise ProtocolError(f"not a message's form: {is_tuple!r:.200}")
    forms = [_checked(meta[i], meta[i + 1]) for i in range(1, len(meta), 2)]
    if not is_tuple and len(forms) != 1:
        raise ProtocolError(f"a single tensor was announced, {len(forms)} are described")
    return is_tuple, forms


def _checked(name: object, shape: object) -> Form:
    on_gpu = isinstance(name, str) and name.endswith(ON_GPU)
    dtype = DTYPES.get(name.removesuffix(ON_GPU)) if isinstance(name, str) else None
    if dtype is None:
        raise ProtocolError(f"dtype {name!r:.100} is not one of {', '.join(DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMS
        or any(type(size) is not int or not 0 <= size <= _INT64_MAX for size in shape)
    ):
        raise ProtocolError(f"not a shape: {shape!r:.200}")
    # torch counts with 64 bits even when one size is 0, so the other sizes have to fit as well.
    if math.prod(size or 1 for size in shape) * dtype.itemsize > _INT64_MAX:
        raise ProtocolError(f"a tensor of shape {shape!r:.200} is more than 2**63 bytes")
    return dtype, tuple(shape), on_gpu


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor is without its values: a dtype and a shape.

    `on_gpu` says where its sender had it; who states a spec leaves that open.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    on_gpu: bool = dataclasses.field(default=False, compare=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Return the spec of `tensor`."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @functools.cached_property
    def nbytes(self) -> int:
        """Length of the tensor's bytes on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize

    def allocate(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return a fresh tensor, not initialised and 64-byte aligned by torch."""
        # Whoever moves bytes allocates, on behalf of any thread: neither its default device nor
        # its inference mode may show in the tensor.
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(mode=False):
                return self.allocate(device)
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        return f"{NAMES.get(self.dtype, self.dtype)}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class MessageSpec:
    """What a message is without its values: its tensors' specs, and whether it is a tuple."""

    tensors: tuple[TensorSpec, ...]
    is_tuple: bool

    @classmethod
    def of(cls, message: Message) -> MessageSpec:
        """Return the spec of `message`."""
        if isinstance(message, torch.Tensor):
            return _single(message.dtype, message.shape)
        return _tuple(*((tensor.dtype, tensor.shape, False) for tensor in message))

    @functools.cached_property
    def nbytes(self) -> int:
        """Length of the message's payload."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @functools.cached_property
    def on_gpu(self) -> bool:
        """Whether some of it was on a GPU."""
        return any(tensor.on_gpu for tensor in self.tensors)

    def __str__(self) -> str:
        names = ", ".join(map(str, self.tensors))
        return f"({names})" if self.is_tuple else names

    def allocate(self, device: torch.device | str = "cpu") -> list[torch.Tensor]:
        """Return fresh tensors for the message, not initialised and 64-byte aligned by torch."""
        return [spec.allocate(device) for spec in self.tensors]

    @functools.cached_property
    def packed(self) -> Packed:
        """The metadata of a message of this spec."""
        return write_meta(self.is_tuple, ((t.dtype, t.shape, t.on_gpu) for t in self.tensors))

    @classmethod
    def from_packed(cls, data: bytes, crc: int) -> MessageSpec:
        """Read metadata that came over the network with its CRC-32, trusting nothing in it.

        Raises:
            ProtocolError: it is not a message's metadata.
        """
        if len(data) <= _CACHED_META_NBYTES:
            return _read_once(data, crc)
        is_tuple, forms = read_meta(data, crc)
        return cls(tuple(TensorSpec(*form) for form in forms), is_tuple)

    def fit(self, payload_nbytes: int) -> None:
        """Check the length that a frame announces for its payload.

        Raises:
            ProtocolError: it is not the length of these tensors.
        """
        if self.nbytes != payload_nbytes:
            raise ProtocolError(
                f"{self} takes {self.nbytes} bytes, the frame announces {payload_nbytes}"
            )

    def pack(self, tensors: Sequence[torch.Tensor]) -> Message:
        """Return the message that `tensors` (of these specs) make up."""
        return tuple(tensors) if self.is_tuple else tensors[0]

    def check(self, arrived: MessageSpec, src: int, tag: int) -> MessageMismatch | None:
        """Return the error to raise when `arrived` is not what this (expected) spec says."""
        if arrived == self:
            return None
        return MessageMismatch(
            f"the message from rank {src} (tag {tag}) holds {arrived}, this rank expects {self}"
        )


# (Rule 4 saves a third of the Python between a small message and the kernel.)
@functools.lru_cache(maxsize=1024)
def _single(dtype: torch.dtype, shape: tuple[int, ...], on_gpu: bool = False) -> MessageSpec:
    return MessageSpec((TensorSpec(dtype, tuple(shape), on_gpu),), False)


@functools.lru_cache(maxsize=1024)
def _tuple(*forms: Form) -> MessageSpec:
    specs = (TensorSpec(dtype, tuple(shape), on_gpu) for dtype, shape, on_gpu in forms)
    return MessageSpec(tuple(specs), True)


@functools.lru_cache(maxsize=1024)
def _read_once(data: bytes, crc: int) -> MessageSpec:
    is_tuple, forms = read_meta(data, crc)
    return _tuple(*forms) if is_tuple else _single(*forms[0])  # the objects that a sender has too
