"""Layers of which the type alone says that three precautions are needless.

A pipeline that knows nothing of a layer has to seed the random generator before it, to make sure
that the gradient which it sends back is canonical (canonical.py), and to hand it a tensor that it
may write to. For small layers that costs as much as their arithmetic. A layer is plain when

1. its forward draws no random numbers,
2. its forward does not write to its input,
3. its backward gives a canonical gradient of its input when it is given a canonical one,
4. its output is new memory: a layer behind it may write there without touching the input,
5. and one tensor, which is canonical when the input is.

The types below are, and their `forward` is called straight away, without the way that torch goes
through hooks. A type of your own says so by `plain = True` in its own class body; what is inherited
does not count, for a subclass may do anything. A layer with hooks, with a forward of its own, that
is compiled or works in place is not plain. Results are the same either way, bit for bit:
tests/test_plain.py holds each type to its word.
"""

from __future__ import annotations

from typing import Final

from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

PLAIN: Final = frozenset({nn.Linear, nn.LayerNorm, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU})


def is_plain(layer: nn.Module | None) -> bool:
    """Return whether a layer is plain, now: hooks may come and go."""
    kind = type(layer)
    if layer is None or (kind not in PLAIN and not vars(kind).get("plain", False)):
        return False
    if getattr(layer, "inplace", False) or "forward" in vars(layer):
        return False
    if kind.__call__ is not nn.Module.__call__ or layer._compiled_call_impl is not None:
        return False
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or has_any_global_hook()  # type: ignore[no-untyped-call]
    )
