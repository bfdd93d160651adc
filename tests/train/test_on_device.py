"""A pipeline on a device that is not the CPU: all is moved there, and no step asks it for a number.

The device is torch's "meta": its tensors have shapes and no numbers, so that whatever would make
the host wait for a GPU (`.item()`, a comparison) is an error there, and so is a tensor left behind.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transport_worlds
from covering import every_pair
from test_exactness import MLP, plain_torch, train
from torch import nn
from torch.nn import functional
from zoo import ZOO, Model, data

import barepp
from barepp.train.batch import Batch, moved
from barepp.train.stage.recompute import Buffers
from barepp.train.stage.seeding import PROCESS_LOCK
from barepp.worker.world import World
from transport.errors import LATE, DeviceError, JobFailed
from transport.inproc import InprocHub, InprocTransport

META = torch.device("meta")
SCHEDULES = {"naive": 1, "interleaved_1f1b": 3, "zb_v": 2}


def world_on(device: torch.device) -> World:
    gpu = SimpleNamespace(device=device, holds=lambda tensor: tensor.device == device)
    return World(InprocTransport(InprocHub(1), 0, gpu=gpu))


@pytest.mark.parametrize(
    ("name", "schedule", "recompute"),
    every_pair(
        ["mlp", "norm", "batchnorm", "attention", "tuples", "dicts"],
        list(SCHEDULES),
        ["off", "all"],
    ),
)
def test_a_step_is_all_on_the_device_and_asks_it_nothing(
    name: str, schedule: str, recompute: str
) -> None:
    model: Model = ZOO[name]
    world = world_on(META)
    pipe = barepp.Pipeline(
        world,
        model.layers,
        functional.cross_entropy,
        schedule=schedule,
        num_stages=SCHEDULES[schedule],
        num_microbatches=3,
        recompute=recompute,
    )
    assert world.device == META
    assert {parameter.device for parameter in pipe.parameters()} == {META}
    inputs, targets = data(model, 7, 0)
    loss = pipe.step(inputs, targets)
    assert loss.device == META and loss.shape == ()
    with_gradients = [p for p in pipe.parameters() if p.grad is not None]
    assert with_gradients and all(p.grad.device == META for p in with_gradients)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    optimizer.step()
    output = pipe.forward(inputs)
    assert isinstance(output, torch.Tensor) and output.device == META and len(output) == 7
    assert pipe.evaluate(inputs, targets).device == META


def test_a_loss_with_tensors_of_its_own_goes_along() -> None:
    loss_fn = nn.CrossEntropyLoss(weight=torch.ones(3))
    pipe = barepp.Pipeline(world_on(META), [partial(nn.Linear, 4, 3)], loss_fn)
    assert pipe.step(torch.ones(2, 4), torch.tensor([0, 2])).device == META


def test_layers_are_built_on_the_cpu_under_the_same_seeds() -> None:
    """Their weights are the same on each device: they are moved once they have them."""
    seen = []

    class Looking(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            seen.append(self.weight.detach().clone())

    for device in (torch.device("cpu"), META):
        barepp.Pipeline(world_on(device), [Looking], nn.MSELoss(), seed=5)
    assert seen[0].is_cpu and torch.equal(*seen)


def test_what_is_there_is_not_moved_again() -> None:
    there = torch.ones(2, 2, device=META)
    copied: list[torch.cuda.Event] = []
    assert moved(there, META, copied) is there
    pair = moved((there, torch.ones(2)), META, copied)
    assert isinstance(pair, tuple) and pair[0] is there and pair[1].device == META
    keyed = moved({"a": torch.ones(2)}, META, copied)
    assert isinstance(keyed, dict) and keyed["a"].device == META
    assert copied == []
    value = torch.ones(2)
    assert moved(value, torch.device("cpu"), copied) is value


def test_a_step_ends_when_page_locked_memory_may_be_written_again() -> None:
    waited = []
    event = SimpleNamespace(synchronize=lambda: waited.append(True))
    Batch(0, (), None, None, copied=[event, event]).let_go()  # type: ignore[list-item]
    assert waited == [True, True]


def test_buffers_are_not_compared_on_a_device() -> None:
    """A bug that nearly was: autograd's count of writes does not change with BatchNorm's averages,
    so that it cannot stand for a comparison. On a GPU all buffers count as changed."""
    kept = {}
    for device in ("cpu", "meta"):
        layers = nn.ModuleDict({"0": nn.BatchNorm1d(3), "1": nn.BatchNorm1d(3).eval()}).to(device)
        buffers = Buffers(layers)
        for layer in layers.values():
            layer(torch.randn(4, 3, device=device))
        buffers.keep_changed()
        kept[device] = [(module is layers["0"], name) for module, name, _, _ in buffers._saved]
    names = ["running_mean", "running_var", "num_batches_tracked"]
    assert kept["cpu"] == [(True, name) for name in names]
    assert kept["meta"] == kept["cpu"] + [(False, name) for name in names]


# -- messages from GPU to GPU ---------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
@pytest.mark.parametrize("name", transport_worlds.ON_GPU)
def test_messages_from_gpu_to_gpu_change_no_bit(name: str, schedule: str) -> None:
    """Over streams that do everything late: a wait that is missing would be a wrong number.

    (The ranks compute on the CPU; what they tell each other goes from a fake GPU to another.)
    """
    with transport_worlds.world(name, 2) as transports:
        worlds = [World(transport, None, PROCESS_LOCK) for transport in transports]

        def learn(world: World) -> tuple[list[float], str]:
            torch.set_num_threads(1)
            with world:
                return train(world, MLP, schedule, 3)[:2]

        found = [transport_worlds.start(partial(learn, world)) for world in worlds]
        assert [each.result(60) for each in found] == [plain_torch(3)] * 2


# -- errors that CUDA tells late ------------------------------------------------------------------

ASSERT = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
)
ERRORS = {
    "accelerator": lambda: getattr(torch, "AcceleratorError", RuntimeError)(ASSERT),
    "runtime": lambda: RuntimeError(ASSERT),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


class Failing(nn.Linear):
    error = "runtime"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ERRORS[self.error]()


def trained(world: barepp.World, error: str) -> None:
    layers = [partial(nn.Linear, 2, 2), partial(Failing, 2, 2)]
    pipe = barepp.Pipeline(world, layers, nn.MSELoss(), num_microbatches=2)
    Failing.error = error
    pipe.step(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_cudas_names_the_rank_and_what_it_was_about(error: str) -> None:
    with pytest.raises(JobFailed) as raised:
        barepp.run(trained, 2, error, transport="inproc")
    message = raised.value.failure.message
    assert raised.value.failure.rank == 1
    first = str(ERRORS[error]()).splitlines()[0]
    assert f"DeviceError: rank 1's GPU failed, noticed while computing 1F0: {first}" in message
    assert (LATE in message) == (error != "memory")  # that is told at once
    assert "CUDA_LAUNCH_BLOCKING=1" in message or error == "memory"


def test_the_cause_is_kept_for_whoever_catches_it() -> None:
    with pytest.raises(DeviceError) as raised, barepp.init() as world:
        trained(world, "runtime")
    assert str(raised.value.__cause__) == ASSERT


def test_an_error_of_the_layers_own_is_left_alone() -> None:
    ERRORS["own"] = lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    try:
        with pytest.raises(RuntimeError, match="mat1 and mat2"), barepp.init() as world:
            trained(world, "own")
    finally:
        del ERRORS["own"]


def test_one_that_shows_in_the_script_is_explained_too() -> None:
    """`loss.item()` is such a call: by then the step has returned."""

    def work(world: barepp.World) -> None:
        raise ERRORS["accelerator"]()

    with pytest.raises(JobFailed) as raised:
        barepp.run(work, 1, transport="inproc")
    assert LATE in raised.value.failure.message
