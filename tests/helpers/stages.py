"""Stages for tests: how they are cut, how values are carried between them, what they came to."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from barepp.plan.partition import partition
from barepp.train.models import LayerBuilder
from barepp.train.stage.boundary import Gradient, Value
from barepp.train.stage.stage import Stage


def every_partition(num_layers: int) -> list[list[int]]:
    """All ways to cut a row of layers: a cut or none at each of the inner boundaries."""
    found = []
    for cuts in itertools.product((0, 1), repeat=num_layers - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), num_layers]
        found.append([b - a for a, b in itertools.pairwise(bounds)])
    return found


def make_stages(
    layers: list[LayerBuilder],
    sizes: list[int],
    seed: int = 3,
    loss_fn: Callable = functional.cross_entropy,
) -> list[Stage]:
    ranges = partition(len(layers), len(sizes), sizes)
    return [
        Stage(i, layer_range, len(sizes), layers, loss_fn, seed=seed)
        for i, layer_range in enumerate(ranges)
    ]


def carried(value: Value | Gradient) -> Value | Gradient:
    """What a connection does to a value: the same numbers in fresh memory."""
    if isinstance(value, dict):
        return {key: carried(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(carried(item) for item in value)
    return None if value is None else value.detach().clone(memory_format=torch.contiguous_format)


def forward(
    stages: list[Stage], x: Tensor, y: Tensor, *, microbatch: int = 0, **options: float
) -> Tensor:
    wanted = None
    for stage in stages:
        x = carried(stage.forward(microbatch, x, target=y, input_requires_grad=wanted, **options))
        wanted = stage.output_requires_grad(microbatch)
    return x


def backward(stages: list[Stage], microbatch: int) -> None:
    gradient = None
    for stage in reversed(stages):
        gradient = carried(stage.backward(microbatch, gradient))
    assert not isinstance(
        gradient, Tensor
    )  # in front of the first stage there is nobody to send one to


def backward_inputs(stages: list[Stage], microbatch: int) -> None:
    gradient = None
    for stage in reversed(stages):
        gradient = carried(stage.backward_inputs(microbatch, gradient))
    assert not isinstance(gradient, Tensor)


def as_bytes(tensor: Tensor | None) -> bytes | None:
    """Stricter than torch.equal: -0.0 is not 0.0, and NaN is NaN."""
    if tensor is None:
        return None
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def gradients(stages: list[Stage]) -> dict[str, bytes | None]:
    return {
        name: as_bytes(parameter.grad)
        for stage in stages
        for name, parameter in stage.named_parameters()
    }
