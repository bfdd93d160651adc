"""What is trained in a benchmark: the same layers, weights and batch for whoever trains it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from barepp.train.models import mlp
from barepp.train.stage.layers import LayerBuilder
from barepp.train.stage.seeding import LayerRandomness

SEED = 0
_HEAVY = 3  # which layer, counted with the one in front that does not sleep


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch and its microbatches.

    `layers` hidden layers of width `hidden` and a head, as `barepp.mlp` makes them. With `sleep_s`,
    layers that sleep so long forwards, and as long for each part of their backward, behind one that
    hardly computes: so the first of them, too, has an input whose gradient is wanted. The third of
    them sleeps `heavy` times as long.
    """

    layers: int = 16
    hidden: int = 128
    batch: int = 32
    microbatches: int = 8
    sleep_s: float = 0.0
    heavy: float = 1.0

    def __str__(self) -> str:
        size = f"{self.layers} layers of {self.hidden}, batch {self.batch}"
        return f"{size} in {self.microbatches} microbatches"

    def builders(self) -> list[LayerBuilder]:
        """Return the layers' builders."""
        if self.sleep_s:
            sleepy = partial(SleepyLinear, self.hidden, self.hidden)
            return [Shift, *(partial(sleepy, seconds) for seconds in self.sleeps_s()[1:])]
        return mlp(self.layers, self.hidden)

    def sleeps_s(self) -> list[float]:
        """Return how long each of the layers that sleep does so, in each of its three parts."""
        return [
            self.sleep_s * (0 if layer == 0 else self.heavy if layer == _HEAVY else 1)
            for layer in range(self.layers + 1)
        ]

    def data(self) -> tuple[Tensor, Tensor]:
        """Return the batch: inputs and targets."""
        generator = torch.Generator().manual_seed(SEED)
        if self.sleep_s:
            inputs = torch.randn(self.batch, self.hidden, generator=generator)
            return inputs, torch.zeros(self.batch)
        inputs = torch.randn(self.batch, 64, generator=generator)
        return inputs, torch.randint(0, 10, (self.batch,), generator=generator)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss over the rows."""
        if self.sleep_s:
            return output[:, 0].mean()
        return nn.functional.cross_entropy(output, target)

    def build(self, which: range) -> nn.Sequential:
        """Build some of the layers, with the weights that `barepp.Pipeline` gives them."""
        builders, model, randomness = self.builders(), nn.Sequential(), LayerRandomness(SEED)
        for layer in which:
            with randomness:
                randomness.seed_initial(layer)
                model.append(builders[layer]())
        return model


class Shift(nn.Module):
    """Adds one learnt number to everything: next to no arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return x + shift."""
        return x + self.shift  # [rows, hidden]


def gradient_square(parameters: Iterable[nn.Parameter]) -> float:
    """Return the sum of the squares of all gradients: how two trainers are held side by side."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return sum(float(gradient.double().square().sum()) for gradient in gradients)


MICROPP = Case()
MIDDLE = Case(hidden=512, batch=256)
LARGE = Case(hidden=1024, batch=512)


# Layers that sleep: what a stage costs is then known, and needs no core.


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


# (Typed in torch from 2.14 on.)
sleep_on_the_way_back: Any = _SleepOnTheWayBack.apply


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
        x = sleep_on_the_way_back(x, self.seconds)
        weight = sleep_on_the_way_back(self.weight, self.seconds)
        return functional.linear(x, weight, self.bias)  # [rows, out_features]
