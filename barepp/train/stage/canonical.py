"""The canonical form: what enters a layer, forwards and backwards, is contiguous and aligned.

Why: a kernel may take another path, and round differently, when its operand is a transposed
view or starts at an odd address (float32 `linear` does, when an operand is not 16-byte aligned).
A tensor that crossed a connection has always landed in fresh, aligned, contiguous memory. Without
this form the bits of a model would depend on where it is cut.

The rules:
1. A microbatch, and a tensor that arrives from another stage, is made canonical.
2. A layer's output is made canonical before the next layer sees it.
3. The gradient of a layer's output is made canonical before that layer's backward sees it.
One process holding all layers obeys the same rules, so the cut cannot matter.
"""

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: a cache line, and what torch's CPU allocator gives each tensor that it makes."""


def canonical(tensor: Tensor) -> Tensor:
    """Return `tensor` itself when it is contiguous and aligned, else a differentiable copy."""
    # `x.conj()` on complex numbers is a flag on the same memory; another stage would receive the
    # numbers worked out, so here they are worked out as well. (clone() does that.)
    if not tensor.data_ptr() % ALIGNMENT and tensor.is_contiguous() and not tensor.is_conj():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def canonical_output(output: Tensor) -> Tensor:
    """Apply rules 2 and 3 at the boundary behind a layer.

    A hook on the output sees the gradient after all contributions to it are summed, and before
    the layer's own backward starts; what it returns takes the gradient's place.

    Of the ways to do that, the hook is the cheapest. Forward and backward of 4 layers (Linear 128
    + ReLU, microbatch 4, one thread, medians): nothing 0.39 ms, this hook 0.45 ms, an
    autograd.Function at each boundary 0.54 ms, a backward call for each layer 0.59 ms.
    """
    output = canonical(output)
    # A leaf (an integer, a frozen layer's output, a bare parameter) has no layer's backward
    # behind it. Hooking a parameter would also pile up one more hook with each microbatch.
    if not output.is_leaf:
        output.register_hook(canonical)  # type: ignore[no-untyped-call]
    return output
