"""What crosses the boundary between two stages: values forwards, their gradients backwards.

    stage 0                            stage 1
    … layer → output ──[1] leave──→ value ──[2] enter──→ layer …
                │                             │
              [4] backward ←── gradient ←──[3] gradient_of

Autograd's graph ends at [1] and a new one starts at [2]: each stage has a graph of its own, and
the pipeline carries the gradient over the gap by hand. [4] is barepp/train/stage/backward.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from barepp.train.stage.canonical import canonical

Value = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What one layer hands to the next."""

Gradient = Tensor | tuple[Tensor | None, ...] | None
"""That of a single tensor, or a tuple for the tensors of a tuple or a dict, in their order. None
where no gradient reaches: for integers, or for what a stage took in and never used. That is not
the same as zeros: a weight without a gradient is left alone by the optimizer, a weight with zeros
still decays."""


@dataclass(slots=True)
class Entered:
    """The inputs of a graph: the leaves that will catch the gradient, and what the layers get."""

    leaves: tuple[Tensor, ...]
    value: Value


def tensors(value: Value) -> tuple[Tensor, ...]:
    """Return the tensors of a value."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(value.values()) if isinstance(value, dict) else value


def like(value: Value, parts: Iterable[Tensor]) -> Value:
    """Return `parts` in the form of `value`: one tensor, a tuple, or a dict with its keys."""
    if isinstance(value, dict):
        return dict(zip(value, parts, strict=True))
    if isinstance(value, tuple):
        return tuple(parts)
    (part,) = parts
    return part


def leave(value: Value) -> Value:
    """[1] Cut the value off the graph behind it, which stays with the stage until its backward."""
    if isinstance(value, Tensor):  # the usual case, here and below
        return value.detach()
    return like(value, [tensor.detach() for tensor in tensors(value)])


def enter(value: Value, wanted: Sequence[bool], writes: bool = True) -> Entered:
    """[2] Start a new graph at this value; `wanted` says of each tensor whether to catch its
    gradient, `writes` whether the first layer may write to what it is given.
    """
    if isinstance(value, Tensor):
        leaf, start = _enter_tensor(value, wanted[0], writes)
        return Entered((leaf,), start)
    pairs = [_enter_tensor(*pair, writes) for pair in zip(tensors(value), wanted, strict=True)]
    return Entered(tuple(caught for caught, _ in pairs), like(value, [given for _, given in pairs]))


def _enter_tensor(tensor: Tensor, wanted: bool, writes: bool) -> tuple[Tensor, Tensor]:
    # Why detach? The tensor object is the sender's or the user's; setting requires_grad on it
    # would reach into their code. This is another one on the same memory.
    leaf = canonical(tensor.detach())
    # Why not always? Data needs no gradient, and integers have none.
    if not (wanted and (leaf.is_floating_point() or leaf.is_complex())):
        return leaf, leaf
    # Why requires_grad? It makes backward stop here and leave the gradient in leaf.grad, as it
    # does for a weight.
    leaf.requires_grad_()
    if not writes:
        return leaf, leaf
    # Why not hand over the leaf itself? A layer that works in place (ReLU(inplace=True)) may not
    # write to a leaf, and it must not matter whether the cut falls in front of it. unsafe_chunk
    # makes a new tensor on the same memory that may be written to: no copy is kept in flight.
    return leaf, torch.unsafe_chunk(leaf, 1)[0] if leaf.dim() else leaf.clone()


def gradient_of(is_tensor: bool, gradients: Sequence[Tensor | None]) -> Gradient:
    """[3] Return what backward has left in the leaves of a value, in the form that it travels."""
    return gradients[0] if is_tensor else tuple(gradients)


def gradients_for(num_tensors: int, gradient: Gradient) -> Sequence[Tensor | None]:
    """Return one gradient for each of a value's tensors; None stands for none at all."""
    if gradient is None:
        return [None] * num_tensors
    return gradient if isinstance(gradient, tuple) else (gradient,)
