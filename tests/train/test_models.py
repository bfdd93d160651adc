"""The MLP: as many layers as asked for, He-normal, each built only when called."""

import math

import pytest
import torch
from torch import nn

from barepp.errors import UsageError
from barepp.train.models import HeLinear, LinearReLU, mlp


@pytest.mark.parametrize("num_layers", [1, 2, 16])
@pytest.mark.parametrize("hidden", [1, 17, 128])
def test_layers_fit_together(num_layers: int, hidden: int) -> None:
    layers = [build() for build in mlp(num_layers, hidden, in_features=9, num_classes=3)]
    assert len(layers) == num_layers + 1
    assert all(type(layer) is LinearReLU for layer in layers[:-1])
    assert type(layers[-1]) is HeLinear  # no ReLU behind the head: a class's score may be negative
    model = nn.Sequential(*layers)
    assert model(torch.randn(5, 9)).shape == (5, 3)
    assert list(model.state_dict())[:2] == ["0.weight", "0.bias"]


def test_a_layer_is_relu_of_linear() -> None:
    layer, x = LinearReLU(5, 7), torch.randn(3, 5)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias).clamp(min=0))


def test_weights_are_he_normal_and_biases_zero() -> None:
    torch.manual_seed(0)
    for build in mlp(3, hidden=256, in_features=256, num_classes=256):
        layer = build()
        assert isinstance(layer, nn.Linear)
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
        # A normal distribution reaches beyond the edge of a uniform one of the same spread.
        assert layer.weight.abs().max().item() > 3 * math.sqrt(2 / 256)
        assert not layer.bias.any()


def test_the_signal_survives_the_depth() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    y = nn.Sequential(*(build() for build in mlp(16, 128, 128)[:-1]))(x)
    assert 0.1 < y.square().mean().item() < 10


def test_a_builder_builds_a_new_layer_on_each_call() -> None:
    build = mlp(1)[0]
    assert build() is not build()


@pytest.mark.parametrize("name", ["num_layers", "hidden", "in_features", "num_classes"])
def test_a_size_below_one_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0"):
        mlp(**{name: 0})
