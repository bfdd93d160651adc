"""A message's metadata: dtypes and shapes as msgpack, trusting nothing in what comes in.

[is_tuple, dtype, shape, dtype, shape, ...]      e.g.  [false, "float32", [8, 128]]

The dtype of a tensor that was on a GPU has a mark behind it: "float32@gpu".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, TypeAlias

import torch

from transport.errors import ProtocolError
from transport.wire import Packed, pack, unpack

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
_INT64_MAX: Final = 2**63 - 1


def write(is_tuple: bool, forms: Iterable[Form]) -> Packed:
    """Return the metadata of a message of tensors of these forms."""
    meta: list[object] = [is_tuple]
    for dtype, shape, on_gpu in forms:
        meta += (NAMES[dtype] + ON_GPU if on_gpu else NAMES[dtype], shape)
    return pack(meta)


def read(data: bytes) -> tuple[bool, list[Form]]:
    """Return what `write` was given.

    Raises:
        ProtocolError: it is not a message's metadata.
    """
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
