"""Models that are hard to cut: each does something at a boundary that could change the numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from barepp.train.models import LayerBuilder, mlp
from barepp.train.stage.boundary import Value
from barepp.train.stage.seeding import derive_seed


class Lambda(nn.Module):
    """A layer without weights: any function."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Value) -> Value:
        return self.function(x)


class Attention(nn.Module):
    """Self-attention with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]  # [rows, sequence, width]


class CheckpointedDropout(nn.Module):
    """Runs its forward again in backward, with the same mask."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._inner, x, use_reentrant=False)

    def _inner(self, x: Tensor) -> Tensor:
        return functional.dropout(self.linear(x), 0.4)


class Fork(nn.Module):
    """Returns a tuple: a hidden tensor, one to be added later, integers, one that nobody uses."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.left = nn.Linear(in_features, out_features)
        self.right = nn.Linear(in_features, out_features)
        self.unused = nn.Linear(in_features, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.left(x), self.right(x).t(), x.argmax(1), self.unused(x).mean()


class Middle(nn.Module):
    """Takes and returns such a tuple, and uses one tensor twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, value: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, residual, indexes, unused = value
        return torch.tanh(self.linear(hidden)) + hidden, residual, indexes, unused


class Join(nn.Module):
    """Takes such a tuple and returns one tensor."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_rows, width)

    def forward(self, value: tuple[Tensor, ...]) -> Tensor:
        hidden, residual, indexes, _ = value
        return hidden + residual.t() + self.embedding(indexes)


class KeyedFork(Fork):
    """Returns such a dict; one key is not ASCII."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(
            zip(("hidden", "rückwärts", "index", "unused"), super().forward(x), strict=True)
        )


class KeyedMiddle(Middle):
    """Changes the dict that it is given, and hands it on in another order."""

    def forward(self, value: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = value.pop("hidden")
        value["hidden"] = torch.tanh(self.linear(hidden)) + hidden
        return value


class KeyedJoin(Join):
    """Takes such a dict and returns one tensor."""

    def forward(self, value: dict[str, Tensor]) -> Tensor:
        names = ("hidden", "rückwärts", "index", "unused")
        return super().forward(tuple(value[name] for name in names))


class WritingLinear(nn.Linear):
    """Writes to what it is given before it uses it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.5).clamp_(min=-1))


def frozen(build: LayerBuilder) -> nn.Module:
    return build().requires_grad_(False)


def evaluating(build: LayerBuilder) -> nn.Module:
    return build().eval()


def layer(function: Callable) -> LayerBuilder:
    return partial(Lambda, function)


linear = partial(partial, nn.Linear)
ENCODER = partial(nn.TransformerEncoderLayer, 64, 4, 128, batch_first=True)


@dataclass(frozen=True)
class Model:
    """Layers, the shape of one row of their input, and what else a test must know of them."""

    layers: list[LayerBuilder]
    row_shape: tuple[int, ...]
    integers: bool = False
    draws: bool = False
    rows_are_independent: bool = True
    num_classes: int = 5


ZOO: dict[str, Model] = {
    "mlp": Model(mlp(4, 17, 13, 5), (13,)),
    "norm": Model(
        [linear(13, 18), partial(nn.LayerNorm, 18), nn.GELU, linear(18, 7), linear(7, 5)], (13,)
    ),
    "dropout": Model(
        [
            linear(12, 20),
            partial(nn.Dropout, 0.3),
            partial(nn.ReLU, inplace=True),
            layer(lambda x: functional.dropout(x, 0.2) if x.sum() > 0 else x),
            linear(20, 5),
        ],
        (12,),
        draws=True,
    ),
    "attention": Model(
        [
            partial(nn.Embedding, 11, 12),
            partial(Attention, 12, 3),
            partial(nn.LayerNorm, 12),
            layer(lambda x: x.mean(1)),
            linear(12, 5),
        ],
        (7,),
        integers=True,
        draws=True,
    ),
    "transposed": Model(
        [
            linear(12, 21),
            layer(lambda x: x.view(len(x), 3, 7).transpose(1, 2)),
            linear(3, 9),
            layer(lambda x: x.transpose(1, 2)),
            layer(lambda x: x[:, 1:4, 1:].flatten(1)),
            linear(18, 5),
        ],
        (12,),
    ),
    "views": Model(
        [
            linear(12, 12),
            layer(lambda x: x[:, 1:]),
            partial(nn.ReLU, inplace=True),
            layer(lambda x: x.unsqueeze(1).expand(-1, 3, -1)),
            nn.Identity,
            layer(lambda x: x.sum(1)),
            linear(11, 5),
        ],
        (12,),
    ),
    "frozen in front": Model(
        [
            partial(frozen, linear(12, 9)),
            nn.ReLU,
            partial(frozen, linear(9, 9)),
            partial(nn.LayerNorm, 9),
            linear(9, 5),
        ],
        (12,),
    ),
    # Only here, and only when no gradient is asked of it, the encoder takes a fused path.
    "frozen backbone": Model(
        [
            partial(frozen, linear(64, 64)),
            *[partial(frozen, partial(evaluating, ENCODER))] * 2,
            layer(lambda x: x.mean(1)),
            linear(64, 5),
        ],
        (33, 64),
    ),
    "frozen in between": Model(
        [linear(12, 9), partial(frozen, linear(9, 9)), nn.ReLU, partial(frozen, linear(9, 5))],
        (12,),
    ),
    "cut off": Model(
        [linear(12, 9), linear(9, 9), layer(lambda x: x.detach().abs()), linear(9, 5)], (12,)
    ),
    "convolution": Model(
        [
            partial(nn.Conv2d, 1, 3, 3, padding=1),
            partial(nn.ReLU, inplace=True),
            partial(nn.MaxPool2d, 2),
            layer(lambda x: x.contiguous(memory_format=torch.channels_last)),
            partial(nn.Conv2d, 3, 4, 2),
            layer(lambda x: x.flatten(1)),
            linear(36, 5),
        ],
        (1, 8, 8),
    ),
    "batchnorm": Model(
        [linear(12, 9), partial(nn.BatchNorm1d, 9), nn.ReLU, linear(9, 5)],
        (12,),
        rows_are_independent=False,
    ),
    "checkpointed": Model(
        [linear(12, 9), partial(CheckpointedDropout, 9, 9), nn.ReLU, linear(9, 5)],
        (12,),
        draws=True,
    ),
    "in place": Model(
        [
            linear(12, 9),
            partial(WritingLinear, 9, 9),
            partial(WritingLinear, 9, 9),
            partial(nn.ReLU, inplace=True),
            linear(9, 5),
        ],
        (12,),
    ),
    "one tensor twice": Model(
        [
            linear(12, 9),
            layer(lambda x: (x, x)),
            layer(lambda pair: (pair[0].exp() + pair[1].sin() + pair[0].cos(), pair[1].tanh())),
            layer(lambda pair: pair[0] * pair[1]),
            linear(9, 5),
        ],
        (12,),
    ),
    "dicts": Model(
        [
            partial(KeyedFork, 12, 9),
            partial(KeyedMiddle, 9),
            partial(KeyedMiddle, 9),
            partial(KeyedJoin, 12, 9),
        ],
        (12,),
        num_classes=9,
    ),
    "tuples": Model(
        [partial(Fork, 12, 9), partial(Middle, 9), partial(Middle, 9), partial(Join, 12, 9)],
        (12,),
        num_classes=9,
    ),
}


def data(model: Model, rows: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of one step, random but the same each time."""
    generator = torch.Generator().manual_seed(derive_seed(1, "data", step=step))
    shape = (rows, *model.row_shape)
    if model.integers:
        inputs = torch.randint(0, 11, shape, generator=generator)
    else:
        inputs = torch.randn(shape, generator=generator)
    return inputs, torch.randint(0, model.num_classes, (rows,), generator=generator)
