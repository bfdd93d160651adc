"""Layers that sleep: what a stage costs is then known, and needs no core."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _SleepOnTheWayBack(torch.autograd.Function):
    """Hands a tensor on; its gradient takes some seconds to come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class SleepyLinear(nn.Linear):
    """Takes as long forward as for its input's gradient and for its weights'.

    If its input needs no gradient (it is the first layer, and gets data), that part takes no time.
    """

    def __init__(self, in_features: int, out_features: int, seconds: float) -> None:
        super().__init__(in_features, out_features)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        time.sleep(self.seconds)
        # Two nodes, one on each way back: a part of the backward passes one of them. (One for both
        # could not tell the parts apart: `ctx.needs_input_grad` is about the forward.)
        x = _SleepOnTheWayBack.apply(x, self.seconds)  # type: ignore[no-untyped-call]
        weight = _SleepOnTheWayBack.apply(self.weight, self.seconds)  # type: ignore[no-untyped-call]
        return functional.linear(x, weight, self.bias)  # [rows, out_features]
