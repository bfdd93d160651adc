"""The model of demos/gpt.py: a transformer, as a list of callables that build one layer each."""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import barepp  # noqa: F401  (before torch)

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_BYTES = 256


class Size(Protocol):
    """What has to be known of a model to build one of its layers."""

    blocks: int
    width: int
    heads: int
    context: int
    dropout: float


class Embedding(nn.Module):
    """Bytes and their places as vectors: [rows, length] int64 → [rows, length, width]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.byte = nn.Embedding(NUM_BYTES, size.width)
        self.place = nn.Embedding(size.context, size.width)
        self.dropout = nn.Dropout(size.dropout)
        for table in (self.byte, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)  # [length]
        return self.dropout(self.byte(text) + self.place(places))  # [rows, length, width]


class Attention(nn.Module):
    """What each place takes from those before it, added to what it has: shape stays."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, size.dropout
        self.norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        shrink(self.out, size)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [rows, heads, length, width / heads]
        dropout = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True
        )  # [rows, heads, length, width / heads]
        found = found.transpose(1, 2).reshape(rows, length, width)
        return x + functional.dropout(self.out(found), dropout)


class FeedForward(nn.Module):
    """What each place makes of what it has, added to it: shape stays."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.dropout = size.dropout
        self.norm = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)
        shrink(self.down, size)

    def forward(self, x: Tensor) -> Tensor:
        made = self.down(functional.gelu(self.up(self.norm(x))))  # [rows, length, width]
        return x + functional.dropout(made, self.dropout, self.training)


class Head(nn.Module):
    """How likely each byte is to come next: [rows, length, width] → [rows, length, 256]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.width)
        self.score = nn.Linear(size.width, NUM_BYTES, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.norm(x))  # [rows, length, 256]


def shrink(linear: nn.Linear, size: Size) -> None:
    """Start small where 2 × blocks layers add to one sum, so that it does not grow with them."""
    nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * size.blocks))
    nn.init.zeros_(linear.bias)


def gpt(size: Size) -> list[Callable[[], nn.Module]]:
    """Return 2 × blocks + 2 builders; a rank calls those of its own stages."""
    block: list[Callable[[], nn.Module]] = [partial(Attention, size), partial(FeedForward, size)]
    return [partial(Embedding, size), *(block * size.blocks), partial(Head, size)]


def loss_fn(scores: Tensor, following: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats: [rows, length, 256] and [rows, length] → []."""
    return functional.cross_entropy(scores.flatten(0, 1), following.flatten())
