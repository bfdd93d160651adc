"""Plain layers keep their word: no random numbers, no writes, canonical gradients; and all others
are taken care of."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from barepp import Pipeline, run
from barepp.train.models import HeLinear, LinearReLU
from barepp.train.stage.canonical import canonical
from barepp.train.stage.layers import PLAIN, Layers, is_plain
from barepp.train.stage.seeding import LayerRandomness
from barepp.train.stage.stage import Stage
from barepp.worker.world import World

SIZE = 16
BUILDERS = {
    nn.Linear: lambda: nn.Linear(SIZE, SIZE),
    nn.LayerNorm: lambda: nn.LayerNorm(SIZE),
    nn.GELU: nn.GELU,
    nn.Tanh: nn.Tanh,
    nn.Sigmoid: nn.Sigmoid,
    nn.SiLU: nn.SiLU,
    HeLinear: lambda: HeLinear(SIZE, SIZE),
    LinearReLU: lambda: LinearReLU(SIZE, SIZE),
}


def test_every_plain_type_is_tested_here():
    assert set(BUILDERS) >= PLAIN
    assert all(is_plain(build()) for build in BUILDERS.values())


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("kind", BUILDERS, ids=lambda kind: kind.__name__)
def test_a_plain_layer_keeps_its_word(kind, rows, training, half):
    layer = BUILDERS[kind]()
    layer.train(training)
    value = torch.randn(*rows, SIZE).requires_grad_()
    before, version, state = value.detach().clone(), value._version, torch.get_rng_state()
    with torch.autocast("cpu", half, enabled=half is not None):
        output = layer(value)
    assert type(output) is torch.Tensor and canonical(output) is output
    assert output.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
    assert torch.equal(torch.get_rng_state(), state)
    assert value._version == version
    assert torch.equal(value, before)
    for wanted in (value, (value, *layer.parameters())):
        (gradient, *_) = torch.autograd.grad(
            output, wanted, torch.randn_like(output), retain_graph=True
        )
        assert canonical(gradient) is gradient


class Inheriting(LinearReLU):
    """It may do anything now: it has not said that it is plain."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(super().forward(x), 0.5)


class Calling(LinearReLU):
    """Its forward is not all that a call does."""

    plain = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(self.forward(x), 0.5)


def test_what_is_not_plain():
    with_hook = nn.Linear(2, 2)
    assert is_plain(with_hook)
    handle = with_hook.register_forward_pre_hook(lambda module, given: None)
    assert not is_plain(with_hook)
    handle.remove()
    assert is_plain(with_hook)
    patched = nn.Linear(2, 2)
    patched.forward = functional.dropout  # type: ignore[method-assign,assignment]
    compiled = nn.Linear(2, 2)
    compiled.compile(backend="eager")
    for layer in (nn.SiLU(inplace=True), patched, compiled, Calling(2, 2)):
        assert not is_plain(layer)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, output: None)
    assert not is_plain(with_hook)
    handle.remove()
    for layer in (nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Sequential(), Inheriting(2, 2), None):
        assert not is_plain(layer)


def layers_of(*modules: nn.Module, loss: bool = False) -> Layers:
    return Layers(
        0,
        range(3, 3 + len(modules)),
        [lambda: None] * 3 + [partial(lambda module: module, module) for module in modules],  # type: ignore[list-item]
        functional.mse_loss if loss else None,
        randomness=LayerRandomness(0),
        device=None,
    )


def test_care_is_taken_of_all_that_is_not_plain_and_of_nothing_else():
    linear, dropout = nn.Linear(2, 2), nn.Dropout()
    care = layers_of(linear, dropout, linear).traits(0)
    assert (care.draws, care.hooked, care.writes) == ({4}, {3}, False)
    assert care.forwards == {5: linear.forward}  # what 3 makes goes to a layer that is not plain
    care = layers_of(dropout, linear, loss=True).traits(0)
    assert (care.draws, care.hooked, care.writes) == ({3, 5}, {4}, True)
    assert not care.forwards


def test_hooks_that_come_between_steps_are_seen():
    linear = nn.Linear(2, 2)
    layers = layers_of(linear)
    assert not layers.traits(0).draws
    linear.register_forward_hook(lambda module, given, output: functional.dropout(output))
    assert layers.traits(1).draws == {3}


def test_a_hook_that_comes_after_an_evaluation_is_seen_by_the_next_step():
    """An evaluation has the number of the step after it, when what it found may not be true."""

    def losses(world: World, cut: list[int]) -> list[float]:
        pipe = Pipeline(
            world, [partial(nn.Linear, 4, 4)] * 4, functional.mse_loss, num_microbatches=2,
            partition=cut,
        )  # fmt: skip
        inputs, targets = torch.ones(4, 4), torch.zeros(4, 4)
        pipe.evaluate(inputs, targets)
        for stage in pipe.stages.values():
            for layer in stage.layers.values():
                layer.register_forward_hook(lambda m, given, output: functional.dropout(output))
        return [pipe.step(inputs, targets).item() for _ in range(3)]

    whole = run(losses, 1, [4], transport="inproc")[0]
    assert whole == run(losses, 2, [2, 2], transport="inproc")[0]
    assert len(set(whole)) == 3


@pytest.mark.parametrize("split", [False, True])
def test_a_gradient_that_comes_back_in_another_form_is_made_canonical(split):
    """The last layer of a stage has no hook: what the next stage sends is put in form once."""
    torch.manual_seed(0)
    stage = Stage(1, range(1, 3), 4, [partial(nn.Linear, 6, 6)] * 4, functional.mse_loss, seed=1)
    gradient = torch.randn(6, 5).T  # not contiguous
    found = []
    for given in (gradient, gradient.contiguous()):
        stage.forward(0, torch.ones(5, 6), step=0, split=split)
        if split:
            found.append(stage.backward_inputs(0, given))
            stage.backward_weights(0)
        else:
            found.append(stage.backward(0, given))
    assert isinstance(found[0], torch.Tensor) and isinstance(found[1], torch.Tensor)
    assert torch.equal(*found)
