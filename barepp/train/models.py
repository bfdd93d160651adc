"""The models of the demos, as layers that are built on demand: the MLP.

A model is a list of callables without arguments, each of which builds one layer. A rank calls
only those of its own stage, so a model larger than any one machine's memory is no special case.
For layers that exist already, `functools.partial` is all it takes:

    layers = [partial(nn.Linear, 64, 128), nn.ReLU, partial(nn.Linear, 128, 10)]

There is no helper that takes a finished `nn.Sequential`: each rank would have to build all of it
first, only to throw the most of it away.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from barepp.errors import UsageError
from barepp.train.stage.layers import LayerBuilder


class HeLinear(nn.Linear):
    """A linear layer whose weights keep the size of the activations through many ReLUs.

    A ReLU halves the mean square of what passes; He et al. (2015, "Delving Deep into Rectifiers",
    section 2.2) draw the weights with variance 2 / in_features to make up for it. With torch's
    default, a sixth of that, the signal through 16 layers is all but gone: the digits are then
    learnt to 0.66 instead of 0.97.
    """

    plain = True  # see layers.py

    def reset_parameters(self) -> None:
        """Draw the initial weights; nn.Linear calls this when it is built."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")  # [out_features, in_features]
        nn.init.zeros_(self.bias)  # [out_features]


class LinearReLU(HeLinear):
    """Linear, then ReLU: one layer of the MLP, with its weights directly under its own name."""

    plain = True

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x W^T + b)."""
        return torch.relu(super().forward(x))  # [rows, out_features]


def mlp(
    num_layers: int = 16, hidden: int = 128, in_features: int = 64, num_classes: int = 10
) -> list[LayerBuilder]:
    """Return `num_layers` hidden layers (Linear + ReLU) and the head: `num_layers` + 1 builders."""
    sizes = {
        "num_layers": num_layers,
        "hidden": hidden,
        "in_features": in_features,
        "num_classes": num_classes,
    }
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"mlp: {name} is {size}; it must be at least 1")
    widths = [in_features] + [hidden] * num_layers
    layers: list[LayerBuilder] = [
        partial(LinearReLU, width, next_width) for width, next_width in pairwise(widths)
    ]
    return [*layers, partial(HeLinear, hidden, num_classes)]
