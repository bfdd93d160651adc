"""What crosses the boundary between two stages: values forwards, their gradients backwards.

    stage 0                            stage 1
    … layer → output ──[1] leave──→ value ──[2] enter──→ layer …
                │                             │
              [4] backward ←── gradient ←──[3] gradient_of

Autograd's graph ends at [1] and a new one starts at [2]: each stage has a graph of its own, and
the pipeline carries the gradient over the gap by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from barepp.canonical import canonical

Value = Tensor | tuple[Tensor, ...]
"""What one layer hands to the next."""

Gradient = Tensor | tuple[Tensor | None, ...] | None
"""The same form as the value that it belongs to. None where no gradient reaches: for integers,
or for what a stage took in and never used. That is not the same as zeros: a weight without a
gradient is left alone by the optimizer, a weight with zeros still decays."""


@dataclass(slots=True)
class Entered:
    """The inputs of a stage: the leaves that will catch the gradient, and what the layers get."""

    leaves: Value
    value: Value


def tensors(value: Value) -> tuple[Tensor, ...]:
    """Return the tensors of a value."""
    return value if isinstance(value, tuple) else (value,)


def leave(value: Value) -> Value:
    """[1] Cut the value off the graph behind it, which stays with the stage until its backward."""
    if isinstance(value, tuple):
        return tuple(tensor.detach() for tensor in value)
    return value.detach()


def enter(value: Value, wanted: Sequence[bool]) -> Entered:
    """[2] Start a new graph at this value; `wanted` says of each tensor whether to catch its
    gradient.
    """
    pairs = [_enter_tensor(*pair) for pair in zip(tensors(value), wanted, strict=True)]
    if isinstance(value, tuple):
        return Entered(tuple(leaf for leaf, _ in pairs), tuple(start for _, start in pairs))
    return Entered(*pairs[0])


def _enter_tensor(tensor: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    # Why detach? The tensor object is the sender's or the user's; setting requires_grad on it
    # would reach into their code. This is another one on the same memory.
    leaf = canonical(tensor.detach())
    # Why not always? Data needs no gradient, and integers have none.
    if not (wanted and (leaf.is_floating_point() or leaf.is_complex())):
        return leaf, leaf
    # Why requires_grad? It makes backward stop here and leave the gradient in leaf.grad, as it
    # does for a weight.
    leaf.requires_grad_()
    # Why not hand over the leaf itself? A layer that works in place (ReLU(inplace=True)) may not
    # write to a leaf, and it must not matter whether the cut falls in front of it. unsafe_chunk
    # makes a new tensor on the same memory that may be written to: no copy is kept in flight.
    return leaf, torch.unsafe_chunk(leaf, 1)[0] if leaf.dim() else leaf.clone()


def gradient_of(leaves: Value) -> Gradient:
    """[3] Return what backward has left in the leaves."""
    if isinstance(leaves, tuple):
        return tuple(leaf.grad for leaf in leaves)
    return leaves.grad


def backward(value: Value, gradient: Gradient) -> None:
    """[4] Run the backward of the graph behind `value`, from the gradient that came back for it."""
    gradients = gradient if isinstance(gradient, tuple) else (gradient,)
    # A frozen stage's output has no graph behind it: the gradient that arrives ends here.
    pairs = [
        (tensor, tensor_gradient)
        for tensor, tensor_gradient in zip(tensors(value), gradients, strict=True)
        if tensor.requires_grad and tensor_gradient is not None
    ]
    if pairs:
        # One call for all tensors: two would walk the shared part of the graph twice.
        torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs])
