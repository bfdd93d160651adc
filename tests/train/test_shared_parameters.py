"""A parameter that two stages share is found before it is trained as two."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from jobs import run_job
from torch import nn
from torch.nn import functional
from zoo import linear

import barepp
from barepp.train.models import LayerBuilder
from barepp.train.shared_parameters import reachable

GLOBAL = nn.Linear(6, 6)
TIED = "layers 1 and 3 share a parameter (1.weight is 3.weight), but they are in stages 0 and 1"


class Tied(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


def from_a_global() -> nn.Module:
    return Tied(GLOBAL.weight)


def from_a_function_of_a_global() -> nn.Module:
    return from_a_global()


class Factory:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def method(self) -> nn.Module:
        return Tied(self.module.weight)

    def __call__(self) -> nn.Module:
        return self.method()


def from_a_list(modules: list[nn.Module], index: int) -> nn.Module:
    return modules[index]


def from_a_default(module: nn.Module = GLOBAL) -> nn.Module:
    return module


def from_a_closure(module: nn.Module) -> LayerBuilder:
    return lambda: Tied(module.weight)


class OfAGlobal(Tied):
    def __init__(self) -> None:
        super().__init__(GLOBAL.weight)


def from_a_keyword(*, weight: nn.Parameter = GLOBAL.weight) -> nn.Module:
    return Tied(weight)


WAYS: dict[str, LayerBuilder] = {
    "global": from_a_global,
    "function": from_a_function_of_a_global,
    "closure": from_a_closure(GLOBAL),
    "class": OfAGlobal,
    "function in a function": lambda: next(Tied(weight) for weight in (GLOBAL.weight,)),
    "argument": partial(Tied, GLOBAL.weight),
    "keyword of a partial": partial(Tied, weight=GLOBAL.weight),
    "default": from_a_default,
    "keyword": from_a_keyword,
    "method": Factory(GLOBAL).method,
    "instance": Factory(GLOBAL),
    "list": partial(from_a_list, [nn.ReLU(), GLOBAL], 1),
    "dict": partial(lambda modules: modules["one"][0], {"one": (GLOBAL,)}),
}


def pipeline(layers: list[LayerBuilder], **options: object) -> Callable[[barepp.World], object]:
    def work(world: barepp.World) -> object:
        pipe = barepp.Pipeline(world, layers, functional.cross_entropy, **options)
        return pipe.step(torch.ones(4, 6), torch.zeros(4, dtype=torch.long)).item()

    return work


@pytest.mark.parametrize("way", WAYS)
def test_what_a_builder_can_reach(way: str) -> None:
    assert id(GLOBAL.weight) in reachable(WAYS[way])


@pytest.mark.parametrize("way", ["global", "closure", "argument", "list"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_two_stages_that_share_are_named(way: str, world_size: int) -> None:
    layers = [linear(6, 6), WAYS["default"], nn.ReLU, WAYS[way], linear(6, 6)]
    options = {"schedule": "interleaved_1f1b", "num_stages": 2, "partition": [2, 3]}
    with pytest.raises(barepp.JobFailed, match="share a parameter") as caught:
        barepp.run(pipeline(layers, **options), world_size, transport="inproc")
    assert TIED in caught.value.failure.message


def test_one_stage_may_share_with_itself() -> None:
    layers = [linear(6, 6), *WAYS.values()]
    assert len(barepp.run(pipeline(layers, partition=[1, len(WAYS)]), 2, transport="inproc")) == 2


def test_layers_that_all_hang_on_one_list_need_not_share() -> None:
    model = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6)]
    layers = [(lambda index=index: model[index]) for index in range(4)]
    barepp.run(pipeline(layers), 4, transport="inproc")


def test_a_builder_that_reaches_no_parameter_of_another_rank_is_not_called() -> None:
    called = []

    def build(index: int) -> nn.Module:
        called.append(index)
        return nn.Linear(6, 6)

    barepp.run(pipeline([partial(build, index) for index in range(4)]), 4, transport="inproc")
    assert sorted(called) == [0, 1, 2, 3]


def test_a_cell_that_is_empty_holds_nothing() -> None:
    def build() -> nn.Module:
        return later

    assert reachable(build) == set()
    later = nn.Linear(1, 1)
    assert id(later.weight) in reachable(build)


SCRIPT = """
    import torch, barepp
    from torch import nn

    embedding = nn.Linear(6, 6)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = embedding.weight

        def forward(self, x):
            return x @ self.weight.t()

    with barepp.init() as world:
        layers = [lambda: embedding, nn.ReLU, lambda: nn.Linear(6, 6), Head]
        barepp.Pipeline(world, layers, nn.functional.cross_entropy)
"""


def test_processes_find_it_too(tmp_path) -> None:
    finished = run_job(tmp_path, SCRIPT, 2)
    assert finished.code != 0
    assert "layers 0 and 3 share a parameter (0.weight is 3.weight)" in finished.report
