"""A backward in two parts, input gradients first and weight gradients later, is the whole one."""

import gc
import itertools
import random
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from stages import (
    as_bytes,
    backward,
    backward_inputs,
    every_partition,
    forward,
    gradients,
    make_stages,
)
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO, Model, data, layer, linear

from barepp.errors import ScheduleError
from barepp.train.batch import microbatch_sizes, split
from barepp.train.models import LayerBuilder
from barepp.train.stage.backward import _TORCH_HAS_EDGES
from barepp.train.stage.stage import Stage

ROWS, MICROBATCHES = 11, 4  # 3, 3, 3, 2


def train(model: Model, cut: list[int], backwards: Callable, **options: bool) -> list[dict]:
    """Two steps of AdamW; `backwards(stages)` does all backwards of a step in some order."""
    stages = make_stages(model.layers, cut)
    optimizers = [
        torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        for stage in stages
        if (parameters := list(stage.parameters()))
    ]
    seen = []
    for step in range(2):
        sizes = microbatch_sizes(ROWS, MICROBATCHES)
        inputs, targets = (split(tensor, sizes) for tensor in data(model, ROWS, step))
        for microbatch, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            weight = sizes[microbatch] / ROWS
            forward(stages, x, y, microbatch=microbatch, step=step, loss_weight=weight, **options)
        backwards(stages)
        seen.append(gradients(stages))
        assert all(stage.in_flight == 0 for stage in stages)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    seen.append({k: as_bytes(v) for s in stages for k, v in s.state_dict().items()})
    return seen


def whole(stages: list[Stage]) -> None:
    for microbatch in range(MICROBATCHES):
        backward(stages, microbatch)


def in_two_parts(stages: list[Stage], delay: int) -> None:
    """I as early as can be, W `delay` microbatches later."""
    for microbatch in range(MICROBATCHES + delay):
        if microbatch < MICROBATCHES:
            backward_inputs(stages, microbatch)
        if microbatch >= delay:
            for stage in stages:
                stage.backward_weights(microbatch - delay)


def now_and_then(stages: list[Stage]) -> None:
    """The even microbatches whole, the odd ones in two parts."""
    for microbatch in range(MICROBATCHES):
        if microbatch % 2:
            backward_inputs(stages, microbatch)
            for stage in stages:
                stage.backward_weights(microbatch)
        else:
            backward(stages, microbatch)


@pytest.mark.parametrize("name", ZOO)
def test_in_two_parts_it_is_the_whole(name: str) -> None:
    model = ZOO[name]
    cuts = every_partition(len(model.layers))
    expected = train(model, cuts[0], whole)
    assert any(expected[0].values())
    some = [cuts[0], cuts[-1], *random.Random(name).sample(cuts, 2)]
    for cut, delay in zip(some, itertools.cycle((0, 2, MICROBATCHES)), strict=False):
        found = train(model, cut, partial(in_two_parts, delay=delay), split=True)
        assert found == expected, f"{name} cut into {cut}, W {delay} microbatches later"
    # Whether forward knew that backward would be split is about its cost, not its result.
    assert train(model, some[2], now_and_then, split=True) == expected
    assert train(model, some[3], now_and_then, split=False) == expected


# Weights that several layers use.


class Uses(nn.Module):
    """Multiplies by a weight, `times` times."""

    def __init__(self, weight: nn.Parameter, times: int) -> None:
        super().__init__()
        self.weight = weight
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(x @ self.weight.t())
        return x


def tied(*times: int, registered: bool = True) -> list[LayerBuilder]:
    """Layers that all use one weight, the first of them so many times, and so on."""
    weight = nn.Parameter(torch.randn(9, 9, generator=torch.Generator().manual_seed(8)))
    uses = [partial(Uses, weight, count) for count in times]
    if not registered:
        uses = [uses[0], *(layer(lambda x: torch.tanh(x @ weight.t())) for _ in uses[1:])]
    return [layer for use in uses for layer in (use, nn.ReLU)]


@pytest.mark.parametrize(
    "times", [(1, 1), (1, 1, 1), (2, 1), (1, 2), (3, 1, 2), (2, 2, 2)], ids=str
)
@pytest.mark.parametrize("registered", [True, False])
def test_a_weight_of_several_layers_is_summed_as_in_plain_torch(
    times: tuple[int, ...], registered: bool
) -> None:
    x, y = torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    (stage,) = make_stages(tied(*times, registered=registered), [2 * len(times)])
    plain = nn.Sequential(*(build() for build in tied(*times, registered=registered)))
    for microbatch in range(3):
        functional.cross_entropy(plain(x + microbatch), y).backward()
        stage.forward(microbatch, x + microbatch, step=0, target=y, split=True)
    for microbatch in range(3):
        stage.backward_inputs(microbatch)
    for microbatch in range(3):
        stage.backward_weights(microbatch)
    [expected] = {as_bytes(parameter.grad) for parameter in plain.parameters()}
    assert set(gradients([stage]).values()) == {expected}


def test_a_hook_on_a_weight_runs_once_with_the_sum() -> None:
    (stage,) = make_stages(tied(1, 1), [4])
    weight = next(stage.parameters())
    seen = []
    weight.register_hook(seen.append)
    stage.forward(0, torch.randn(2, 9), step=0, target=torch.tensor([0, 1]), split=True)
    stage.backward_inputs(0)
    assert not seen
    stage.backward_weights(0)
    assert [torch.equal(gradient, weight.grad) for gradient in seen] == [True]


def test_weights_that_are_thawed_are_trained_from_the_next_step_on() -> None:
    (stage,) = make_stages([linear(4, 4), nn.ReLU, linear(4, 5)], [3])
    first = stage.layers["0"]
    # The last step fails, and is done again.
    for step, trained in ((0, False), (1, True), (2, False), (2, True)):
        first.requires_grad_(trained)
        stage.forward(0, torch.randn(2, 4), step=step, target=torch.tensor([0, 1]), split=True)
        stage.backward_inputs(0)
        stage.backward_weights(0)
        assert (first.weight.grad is not None) == trained
        assert stage.layers["2"].weight.grad is not None
        for parameter in stage.parameters():
            parameter.grad = None
        if step == 2:
            stage.clear()


# What is computed when, and what is kept.


class Path(torch.autograd.Function):
    """Writes down when its backward runs; it lies on one of a layer's two ways back."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str, ran: list[str]) -> Tensor:
        ctx.name, ctx.ran = name, ran
        return x * 1

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ctx.ran.append(ctx.name)
        return gradient, None, None


class Watched(nn.Linear):
    """A layer whose two ways back are watched."""

    def __init__(self, ran: list[str], name: str) -> None:
        super().__init__(5, 5)
        self.ran = ran
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        x = Path.apply(x, f"inputs {self.name}", self.ran)
        return functional.linear(x, Path.apply(self.weight, f"weights {self.name}", self.ran))


def test_each_gradient_is_computed_once_and_in_its_part() -> None:
    ran: list[str] = []
    stage = Stage(
        1,
        range(1, 4),
        4,
        [partial(Watched, ran, str(i)) for i in range(4)],
        functional.cross_entropy,
        seed=0,
    )
    stage.forward(0, torch.randn(2, 5), step=0, split=True)
    stage.backward_inputs(0, torch.randn(2, 5))
    assert ran == ["inputs 3", "inputs 2", "inputs 1"]
    ran.clear()
    stage.backward_weights(0)
    assert ran == ["weights 3", "weights 2", "weights 1"]


class Kept(torch.autograd.Function):
    """Keeps for backward something that the test can see the end of."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str, alive: dict[str, weakref.ref]) -> Tensor:
        ctx.extra = torch.ones(3)
        alive[name] = weakref.ref(ctx.extra)
        return x * 1

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient * ctx.extra[0], None, None


def test_each_part_frees_what_the_other_does_not_need() -> None:
    alive: dict[str, weakref.ref] = {}

    def keeping(name: str) -> LayerBuilder:
        return layer(lambda x: Kept.apply(x, name, alive))

    class KeepingLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Kept.apply(super().forward(x), "weights", alive)

    class FrozenLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Kept.apply(super().forward(x), "frozen", alive)

    frozen = FrozenLinear(4, 4).requires_grad_(False)
    layers = [partial(KeepingLinear, 4, 4), keeping("function"), lambda: frozen, keeping("last")]
    (stage,) = make_stages(layers, [4])

    def left() -> set[str]:
        return {name for name, ref in alive.items() if ref() is not None}

    gc.disable()  # the memory must go at once, and not when the collector happens to pass
    try:
        stage.forward(0, torch.randn(2, 4), step=0, target=torch.tensor([0, 1]), split=True)
        assert left() == {"weights", "function", "frozen", "last"}
        stage.backward_inputs(0)
        assert left() == {"weights"}
        stage.backward_weights(0)
        assert not left()
    finally:
        gc.enable()


@pytest.mark.skipif(not _TORCH_HAS_EDGES, reason="see barepp/train/stage/backward.py")
def test_an_output_is_not_kept_for_its_place_in_the_graph() -> None:
    made: list[weakref.ref] = []

    def watching(build: LayerBuilder) -> nn.Module:
        module = build()
        module.register_forward_hook(lambda *arguments: made.append(weakref.ref(arguments[-1])))
        return module

    # Linear keeps its input and its weights, never its output; ReLU keeps its output.
    layers = [partial(watching, linear(4, 4)), nn.ReLU, partial(watching, linear(4, 4))]
    stage = Stage(0, range(3), 2, layers, functional.cross_entropy, seed=0)
    stage.forward(0, torch.randn(2, 4), step=0, split=True)
    assert [ref() for ref in made] == [None, None]
    stage.backward_inputs(0, torch.randn(2, 4))
    stage.backward_weights(0)
    assert all(parameter.grad is not None for parameter in stage.parameters())


class Doubled(torch.autograd.Function):
    """The last operation of a graph may be a user's own; its memory is managed differently."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_a_graph_may_end_in_the_users_own_function() -> None:
    class DoubledLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(super().forward(x))

    stages = [
        Stage(0, range(2), 2, [partial(DoubledLinear, 4, 4)] * 2, functional.cross_entropy, seed=0)
        for _ in range(2)
    ]
    x, gradient = torch.randn(2, 4), torch.randn(2, 4)
    for stage, in_parts in zip(stages, (True, False), strict=True):
        stage.forward(0, x, step=0, split=in_parts)
        gc.collect()
        if in_parts:
            stage.backward_inputs(0, gradient)
            gc.collect()
            stage.backward_weights(0)
        else:
            stage.backward(0, gradient)
    assert gradients(stages[:1]) == gradients(stages[1:])


# Layers that write in place, and layers without weights.


def test_writing_over_what_a_backward_needs_is_refused_as_in_plain_torch() -> None:
    class TanhLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))  # tanh keeps what it returns

    class HandsOn(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    class Writes(nn.Linear):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return super().forward(pair[0]) + pair[1].mul_(2)

    layers = [partial(kind, 4, 4) for kind in (TanhLinear, HandsOn, Writes)]
    refused = "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=refused):
        nn.Sequential(*(build() for build in layers))(torch.randn(2, 4)).sum().backward()
    for in_parts in (False, True):
        (stage,) = make_stages(layers, [3])
        stage.forward(0, torch.randn(2, 4), step=0, target=torch.tensor([0, 1]), split=in_parts)
        with pytest.raises(RuntimeError, match=refused):  # the first layer has no part but W
            stage.backward_inputs(0)
            stage.backward_weights(0)


def test_a_stage_without_weights_hands_the_gradient_on_and_keeps_nothing() -> None:
    stages = make_stages(
        [linear(4, 4), partial(nn.ReLU, inplace=True), nn.Tanh, linear(4, 5)], [1, 2, 1]
    )
    forward(stages, torch.randn(2, 4), torch.tensor([0, 1]), step=0, split=True)
    backward_inputs(stages, 0)
    assert [stage.in_flight for stage in stages] == [1, 1, 1]
    for stage in stages:
        stage.backward_weights(0)
    assert [stage.in_flight for stage in stages] == [0, 0, 0]
    assert all(parameter.grad is not None for stage in stages for parameter in stage.parameters())


# Mistakes.


def test_parts_out_of_order_are_named() -> None:
    stage = make_stages([linear(4, 4), linear(4, 5)], [1, 1])[1]
    weights_first = r"stage 1: weight gradients \(W\) of microbatch 3 before its input gradients"
    not_there = r"stage 1: input gradients \(I\) of microbatch 3, which is not in flight"
    with pytest.raises(ScheduleError, match=weights_first):
        stage.backward_weights(3)
    with pytest.raises(ScheduleError, match=not_there):
        stage.backward_inputs(3)
    stage.forward(3, torch.randn(2, 4), step=0, target=torch.tensor([0, 1]), split=True)
    with pytest.raises(ScheduleError, match=weights_first):
        stage.backward_weights(3)
    stage.backward_inputs(3)
    with pytest.raises(ScheduleError, match=not_there):
        stage.backward_inputs(3)
    with pytest.raises(ScheduleError, match="stage 1: backward of microbatch 3, which is not in"):
        stage.backward(3)
    assert stage.in_flight == 1
    stage.backward_weights(3)
    with pytest.raises(ScheduleError, match=weights_first):
        stage.backward_weights(3)
    assert stage.in_flight == 0
