"""How an activation or a gradient becomes a message between two stages, and back.

The usual case, one tensor whose gradient is wanted, travels as it is. The others say more:

    activation   tensor                       one tensor, and its gradient has a use
                 (flags, tensor, ...)         flags: the form (0 a tensor, 1 a tuple), then for each
                                              tensor whether its gradient has a use
                 (flags, keys, tensor, ...)   form 2, a dict: its keys as a JSON array in UTF-8
    gradient     tensor                       that of a single tensor
                 ()                           none: the graph does not reach that far
                 (flags, tensor, ...)         those of a tuple, or of a dict in the order of its
                                              keys; flags: for each member whether it has one

Why say that there is no gradient instead of sending zeros? An optimizer leaves a weight without a
gradient alone; one with zeros still decays. And why tell whether a gradient has a use? Behind a
frozen stage it would be computed for nothing, and a layer may choose another kernel because of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from barepp.train.stage.boundary import Gradient, Value
from transport.errors import ProtocolError

if TYPE_CHECKING:
    from transport.message.specs import Message

_TENSOR, _TUPLE, _DICT = range(3)


def pack_activation(value: Value, wanted: Sequence[bool]) -> Message:
    """Return the message for a stage's output; `wanted` as from `Stage.output_requires_grad`."""
    if isinstance(value, torch.Tensor):
        return value if wanted[0] else (_flags([_TENSOR, False]), value)
    if isinstance(value, dict):
        return (_flags([_DICT, *wanted]), _keys(tuple(value)), *value.values())
    return (_flags([_TUPLE, *wanted]), *value)


def unpack_activation(message: Message) -> tuple[Value, Sequence[bool] | None]:
    """Undo `pack_activation`: the value, and which gradients are wanted (None for all)."""
    if isinstance(message, torch.Tensor):
        return message, None
    flags, *parts = message
    form, *wanted = flags.tolist()
    if form == _DICT:
        keys, *parts = parts
        return dict(zip(_names(keys, len(parts)), parts, strict=True)), list(map(bool, wanted))
    return (tuple(parts) if form == _TUPLE else parts[0]), list(map(bool, wanted))


def pack_gradient(gradient: Gradient) -> Message:
    """Return the message for a gradient as `Stage.backward` gives it."""
    if isinstance(gradient, torch.Tensor):
        return gradient
    if gradient is None:
        return ()
    there = [part is not None for part in gradient]
    return (_flags(there), *(part for part in gradient if part is not None))


def unpack_gradient(message: Message | None) -> Gradient:
    """Undo `pack_gradient`; None, which is no message, is no gradient either."""
    if isinstance(message, torch.Tensor):
        return message
    if not message:
        return None
    flags, *parts = message
    rest = iter(parts)
    return tuple(next(rest) if there else None for there in flags.tolist())


def copied(message: Message) -> Message:
    """Return a copy, for a handover without a transport: the receiving stage may write to it."""
    if isinstance(message, torch.Tensor):
        return message.clone()
    return tuple(tensor.clone() for tensor in message)


def _flags(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@lru_cache(maxsize=64)
def _keys(names: tuple[str, ...]) -> torch.Tensor:
    # Never written to: it is sent, or copied. A layer's keys are the same in each microbatch.
    return torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)


def _names(keys: torch.Tensor, count: int) -> list[str]:
    try:
        names = json.loads(bytes(keys.tolist()))
    except ValueError:
        names = None
    if not (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names) == count
    ):
        raise ProtocolError(f"not the keys of a dict of {count} tensors: {names!r:.200}")
    return names
