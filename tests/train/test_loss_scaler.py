"""Loss scaling: the same as one process with torch's GradScaler, and one decision for all ranks."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from covering import every_pair
from test_autocast import build
from test_exactness import MLP, SCHEDULES, SEED, data, sha256
from torch import nn
from torch.nn import functional

import barepp

BATCHES = data(MLP, [20, 13, 20] * 5)
# So large that the first steps are skipped, and a growth that comes twice and overshoots again.
SCALING: dict[str, Any] = {"init_scale": 2.0**22, "growth_interval": 3, "growth_factor": 8.0}
Curve = list[tuple[float, float]]  # of each step: the loss, the scale afterwards


def reference(num_microbatches: int, **scaling: Any) -> tuple[Curve, str]:
    """One process, as torch's manual has it ("Typical Mixed Precision Training")."""
    model = build(MLP)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", **scaling)
    curve = []
    for inputs, targets in BATCHES:
        optimizer.zero_grad()
        count = min(num_microbatches, len(inputs))
        total = torch.zeros(())
        for x, y in zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True):
            with torch.autocast("cpu", torch.float16):
                loss = functional.cross_entropy(model(x), y) * (len(y) / len(targets))
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.step(optimizer)
        scaler.update()
        curve.append((total.item(), scaler.get_scale()))
    return curve, sha256(model.parameters())


def test_without_scaling_the_optimizers_step_and_nothing_else() -> None:
    """A script with float16 as an option has one loop."""
    with barepp.init() as world:
        pipe = barepp.Pipeline(world, MLP.layers, functional.cross_entropy, seed=SEED)
        scaler = barepp.LossScaler(pipe, enabled=False)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.01)
        for weight in pipe.parameters():
            weight.grad = torch.full_like(weight, math.inf)
        assert scaler.step(optimizer) and pipe.loss_scale == scaler.scale == 1
        assert not any(weight.isfinite().any() for weight in pipe.parameters())


def train(world: barepp.World, schedule: str, num_microbatches: int, **scaling: Any) -> Any:
    pipe = barepp.Pipeline(
        world,
        MLP.layers,
        functional.cross_entropy,
        schedule=schedule,
        num_microbatches=num_microbatches,
        seed=SEED,
        autocast=torch.float16,
    )
    optimizer = torch.optim.Adam(pipe.parameters(), lr=0.01)
    scaler = barepp.LossScaler(pipe, **scaling)
    curve = []
    for inputs, targets in BATCHES:
        pipe.zero_grad()
        loss = pipe.step(inputs, targets)
        scaler.step(optimizer)
        curve.append((loss.item(), scaler.scale))
    return curve, pipe.parameters_sha256()


@pytest.mark.parametrize(
    ("schedule", "world_size", "num_microbatches"), every_pair(SCHEDULES, [1, 2, 4], [1, 4])
)
def test_it_is_torchs_grad_scaler_over_several_ranks(
    schedule: str, world_size: int, num_microbatches: int
) -> None:
    expected = reference(num_microbatches, **SCALING)
    scales = [scale for _, scale in expected[0]]
    assert min(scales) < SCALING["init_scale"]  # some steps are skipped,
    assert any(b > a for a, b in pairwise(scales))  # and then it grows
    work = partial(train, **SCALING)
    results = barepp.run(work, world_size, schedule, num_microbatches, transport="inproc")
    assert results == [expected] * world_size


def test_the_defaults_are_torchs() -> None:
    [found] = barepp.run(train, 1, "naive", 4, transport="inproc")
    assert found == reference(4)


class Bomb(nn.Linear):
    """A layer whose gradients are no numbers when it is told so."""

    def __init__(self, width: int, when: set[int]) -> None:
        super().__init__(width, width)
        self.when, self.step = when, 0
        self.weight.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return gradient * float("nan") if self.step - 1 in self.when else gradient


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_one_rank_finds_skips_the_step_everywhere(rank: int) -> None:
    """The bomb is in one rank's layer, and its gradient goes no further."""

    def work(world: barepp.World) -> list[tuple[bool, bool, float]]:
        layers = [partial(Bomb, 4, {1} if index == rank else set()) for index in range(3)]
        pipe = barepp.Pipeline(world, layers, nn.MSELoss(), num_microbatches=1)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        scaler = barepp.LossScaler(pipe)
        seen = []
        for _ in range(3):
            before = [parameter.detach().clone() for parameter in pipe.parameters()]
            pipe.zero_grad()
            pipe.step(torch.ones(2, 4), torch.zeros(2, 4))
            stepped = scaler.step(optimizer)
            after = list(pipe.parameters())
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            seen.append((stepped, same, scaler.scale))
        return seen

    expected = [(True, False, 2.0**16), (False, True, 2.0**15), (True, False, 2.0**15)]
    assert barepp.run(work, 3, transport="inproc") == [expected] * 3


def test_a_rank_without_weights_takes_part() -> None:
    def work(world: barepp.World) -> tuple[bool, float]:
        layers = [partial(nn.Linear, 4, 4), nn.ReLU]
        pipe = barepp.Pipeline(world, layers, nn.MSELoss(), num_microbatches=1)
        scaler = barepp.LossScaler(pipe, init_scale=2.0**127, growth_interval=1)
        pipe.step(torch.full((2, 4), 1e30), torch.zeros(2, 4))
        weights = list(pipe.parameters())
        optimizers = [torch.optim.SGD(weights, lr=0.1)] if weights else []
        return scaler.step(*optimizers), scaler.scale

    assert barepp.run(work, 2, transport="inproc") == [(False, 2.0**126)] * 2


def alone(**scaling: Any) -> tuple[barepp.Pipeline, barepp.LossScaler]:
    world = barepp.init()
    with world:
        pipe = barepp.Pipeline(world, [partial(nn.Linear, 2, 2)], nn.MSELoss())
        return pipe, barepp.LossScaler(pipe, **scaling)


def test_it_does_not_grow_beyond_what_float32_can_hold() -> None:
    pipe, scaler = alone(init_scale=2.0**127, growth_interval=1)
    assert scaler.step() and scaler.scale == pipe.loss_scale == 2.0**127


def test_gradients_that_are_never_numbers_are_skipped_for_ever() -> None:
    """After 165 steps the scale is 0 in float32, as GradScaler's is."""
    pipe, scaler = alone(init_scale=2.0**-149)
    weights = list(pipe.parameters())
    for expected in (0.0, 0.0):
        for weight in weights:
            weight.grad = torch.full_like(weight, math.nan)
        assert not scaler.step(torch.optim.SGD(weights, lr=0.1))
        assert scaler.scale == expected


def test_a_training_that_goes_on_later_goes_on_with_its_scale() -> None:
    _, scaler = alone(growth_interval=3)
    assert scaler.step() and scaler.step()
    pipe, later = alone(growth_interval=3, init_scale=1.0)
    later.load_state_dict(scaler.state_dict())
    assert later.scale == pipe.loss_scale == 2.0**16
    assert later.step() and later.scale == 2.0**17


def test_gradients_in_float16_cannot_be_unscaled() -> None:
    pipe, scaler = alone()
    weights = [parameter.half().detach().requires_grad_() for parameter in pipe.parameters()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(barepp.UsageError, match="keep the parameters in float32"):
        scaler.step(torch.optim.SGD(weights, lr=0.1))


@pytest.mark.parametrize(
    "wrong",
    [{"init_scale": 0.0}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"growth_interval": 0}],
)
def test_a_scaling_that_cannot_work_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(barepp.UsageError, match=next(iter(wrong))):
        alone(**wrong)


def test_the_loss_that_a_step_returns_is_not_scaled() -> None:
    pipe, scaler = alone(init_scale=64.0)
    x, y = torch.ones(2, 2), torch.zeros(2, 2)
    loss = pipe.step(x, y)
    scaled = [parameter.grad.clone() for parameter in pipe.parameters()]
    assert scaler.step(torch.optim.SGD(pipe.parameters(), lr=0.0))
    for parameter, before in zip(pipe.parameters(), scaled, strict=True):
        assert torch.equal(parameter.grad * 64, before)
    assert loss == pipe.evaluate(x, y)
