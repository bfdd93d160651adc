"""What layers cost is measured without holding the model, and without touching what is trained."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from stages import as_bytes
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO, WritingLinear, data, layer, linear

import barepp
from barepp.bench.case import SleepyLinear
from barepp.errors import UsageError
from barepp.plan.partition import partition
from barepp.train.layer_profiler import profile
from barepp.train.models import LayerBuilder

cross_entropy = functional.cross_entropy
run = partial(barepp.run, transport="inproc")


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, 6), torch.zeros(rows, dtype=torch.long)


@pytest.mark.parametrize("name", ZOO)
def test_every_model_that_is_hard_to_cut_is_measured(name: str) -> None:
    model = ZOO[name]
    inputs, targets = data(model, 4, 0)
    before, given = torch.default_generator.get_state(), inputs.clone()
    costs = profile(model.layers, cross_entropy, inputs, targets, budget_s=0)
    assert torch.equal(torch.default_generator.get_state(), before)
    assert torch.equal(inputs, given)
    assert len(costs) == len(model.layers)
    assert all(min(cost) >= 0 for cost in costs)
    for cost, build in zip(costs, model.layers, strict=True):
        assert cost.parameter_nbytes == sum(p.nbytes for p in build().parameters())
    assert sum(cost.forward_s for cost in costs) > 0
    assert costs[-1].output_nbytes == 4  # the loss


def test_each_cost_is_the_layers_own() -> None:
    light, heavy = 0.002, 0.03
    layers = [
        linear(6, 6),
        partial(SleepyLinear, 6, 6, light),
        partial(SleepyLinear, 6, 6, heavy),
        partial(SleepyLinear, 6, 6, light),
    ]
    _, *costs = profile(layers, cross_entropy, *batch(), budget_s=0)
    for cost, seconds in zip(costs, (light, heavy, light), strict=True):
        for part in (cost.forward_s, cost.backward_input_s, cost.backward_weight_s):
            assert part > 0.8 * seconds  # a sleep is never shorter; the rest is what is taken off
        assert cost.backward_s > 1.8 * seconds
    assert costs[1].forward_s > 2 * costs[0].forward_s


def test_what_needs_no_gradient_costs_no_backward() -> None:
    def frozen(build: LayerBuilder) -> nn.Module:
        return build().requires_grad_(False)

    sleepy = partial(SleepyLinear, 6, 6, 0.02)
    layers = [partial(frozen, sleepy), sleepy, partial(frozen, sleepy)]
    first, second, third = profile(layers, cross_entropy, *batch(), budget_s=0)
    # The first one's input is data, and the second one's a frozen layer's output.
    for cost in (first.backward_s, first.backward_input_s, first.backward_weight_s):
        assert cost < 0.015
    assert second.backward_input_s < 0.015 < second.backward_weight_s
    assert third.backward_weight_s < 0.015 < third.backward_input_s


def test_bytes_are_counted_once() -> None:
    rows, width = 8, 16
    nbytes = rows * width * 4
    layers = [
        linear(6, width),  # keeps its input, which is data
        nn.ReLU,  # keeps its output
        linear(width, width),  # keeps its input, the same
        nn.Tanh,  # keeps its output
        partial(nn.Dropout, 0.5),  # keeps its mask
        layer(lambda x: (x, x.argmax(1))),  # keeps nothing of its own
        layer(lambda pair: pair[0]),
        linear(width, 3),  # keeps its input, which nobody has kept yet
    ]
    costs = profile(layers, cross_entropy, *batch(rows), budget_s=0)
    kept = [cost.kept_nbytes for cost in costs]
    assert kept[:4] == [0, nbytes, 0, nbytes]
    assert 0 < kept[4] <= nbytes
    assert kept[5:7] == [0, 0]
    assert nbytes <= kept[7] <= nbytes + 2 * rows * 8 + 2 * rows * 3 * 4  # and the loss's
    crossing = [cost.output_nbytes for cost in costs]
    assert crossing == [nbytes] * 5 + [nbytes + rows * 8, nbytes, 4]


def test_nobody_ever_holds_the_whole_model() -> None:
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Counted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.note()

        def __deepcopy__(self, memo: dict) -> Counted:
            found = Counted()
            found.load_state_dict(self.state_dict())
            return found

        def note(self) -> None:
            nonlocal most
            alive.add(self)
            most = max(most, len(alive))

    profile([Counted] * 6, cross_entropy, *batch(), budget_s=0)
    gc.collect()
    # One that is measured and its original; the one before may not be dropped yet.
    assert (most, len(alive)) == (3, 0)


def test_modules_that_exist_already_are_left_as_they_are() -> None:
    model = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6)]
    before = [copy.deepcopy(module.state_dict()) for module in model]
    layers = [(lambda index=index: model[index]) for index in range(4)]
    profile(layers, cross_entropy, *batch(), budget_s=0)
    for module, state in zip(model, before, strict=True):
        assert {k: as_bytes(v) for k, v in module.state_dict().items()} == {
            k: as_bytes(v) for k, v in state.items()
        }
        assert all(parameter.grad is None for parameter in module.parameters())


def test_a_loss_with_weights_and_counts_of_its_own_is_left_as_it_is() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return cross_entropy(output * self.scale, target)

    loss = Scaled()
    assert len(profile([linear(6, 6)] * 2, loss, *batch(), budget_s=0)) == 2
    assert loss.calls == 0
    assert loss.scale.grad is None


def test_a_first_layer_that_writes_to_its_input_does_not_write_to_the_sample() -> None:
    layers = [partial(WritingLinear, 6, 6), linear(6, 6)]
    inputs, targets = batch()
    profile(layers, cross_entropy, inputs, targets, budget_s=0)
    assert torch.equal(inputs, batch()[0])


def test_a_layer_that_cannot_be_copied_is_a_sentence() -> None:
    class Locked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.lock = threading.Lock()

    with pytest.raises(
        UsageError, match="type Locked cannot be copied .*give the number of layers"
    ):
        profile([linear(6, 6), Locked, linear(6, 6)], cross_entropy, *batch(), budget_s=0)


def test_more_compute_threads_come_back_also_after_an_error() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        if len(seen) > 4:
            raise ZeroDivisionError
        return x

    torch.set_num_threads(2)
    try:
        with torch.no_grad(), pytest.raises(ZeroDivisionError) as caught:
            profile([linear(6, 6), layer(look), linear(6, 6)], cross_entropy, *batch())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(seen) == {1}
    notes = getattr(caught.value, "__notes__", ["layer 1", "a balanced partition"])
    assert "layer 1" in notes[0] and "a balanced partition" in notes[-1]


def test_the_time_is_bounded() -> None:
    forwards = 0

    def count(x: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return x

    profile([layer(count), linear(6, 6)], cross_entropy, *batch(), budget_s=0)
    assert (
        forwards == 2 * barepp.train.layer_profiler.LEAST_RUNS + 1
    )  # whole, in two parts; and a look
    forwards = 0
    profile([layer(count), linear(6, 6)], cross_entropy, *batch(), budget_s=1e9)
    assert forwards == 2 * barepp.train.layer_profiler.MOST_RUNS + 1


# -- through the pipeline --------------------------------------------------------------------------


def pipeline(world: barepp.World, layers: list[LayerBuilder], **options: object) -> list[int]:
    pipe = barepp.Pipeline(world, layers, cross_entropy, partition="balanced", **options)
    for index, stage in pipe.stages.items():
        assert len(stage.layer_range) == pipe.partition[index]
    return pipe.partition


def sleepy_layers() -> list[LayerBuilder]:
    seconds = [0.0005, 0.0005, 0.005, 0.0005, 0.0005, 0.0005]
    return [partial(SleepyLinear, 6, 6, one) for one in seconds]


def test_all_ranks_cut_alike_and_only_the_first_one_needs_a_sample() -> None:
    def work(world: barepp.World) -> list[int]:
        sample = batch() if world.rank == 0 else None
        return pipeline(world, sleepy_layers(), sample=sample)

    # The heavy layer is alone, between the two before it and the three behind.
    assert run(work, 3) == [[2, 1, 3]] * 3


def test_the_sample_is_a_batch_and_one_microbatch_of_it_is_measured() -> None:
    rows = []

    def look(x: Tensor) -> Tensor:
        rows.append(len(x))
        return x

    def work(world: barepp.World) -> list[int]:
        layers = [layer(look), linear(6, 6), linear(6, 6)]
        return pipeline(world, layers, sample=batch(11), num_microbatches=4)

    run(work, 2)
    assert set(rows) == {3}


def test_the_users_random_numbers_are_not_disturbed() -> None:
    def work(world: barepp.World) -> list[float]:
        torch.manual_seed(5)
        layers = [linear(6, 6), partial(nn.Dropout, 0.5), linear(6, 6)]
        pipeline(world, layers, sample=batch())
        return torch.rand(3).tolist()

    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    assert run(work, 1) == [expected]


@pytest.mark.parametrize("world_size", [1, 2])
def test_who_has_measured_does_not_go_on_to_say_so(world_size: int) -> None:
    def work(world: barepp.World) -> tuple[object, ...]:
        pipeline(world, [linear(6, 6)] * 2, sample=batch())
        return world.activity

    assert run(work, world_size) == [()] * world_size


def test_a_memory_limit_reaches_the_cut() -> None:
    """Four layers of which the two in the middle are large: one stage cannot have both."""
    layers = [linear(6, 6), linear(6, 200), linear(200, 6), linear(6, 6)]
    large = 4 * 4 * (6 * 200 + 200)  # bytes: parameters, gradients, Adam's averages
    # Everything is done in no time but the first layer, which would like to be alone.
    layers[0] = partial(SleepyLinear, 6, 6, 0.02)

    def work(world: barepp.World, limit: int | None) -> list[int]:
        return pipeline(world, layers, sample=batch(), memory_limit=limit, num_microbatches=1)

    assert run(work, 2, None) == [[1, 3]] * 2
    assert run(work, 2, int(1.7 * large)) == [[2, 2]] * 2


def failing(words: str, work, world_size: int = 2) -> None:
    with pytest.raises(barepp.JobFailed) as caught:
        run(work, world_size)
    assert words in caught.value.failure.message
    assert caught.value.failure.exit_code == 2


def test_what_is_missing_is_a_sentence() -> None:
    layers = [linear(6, 6)] * 3
    failing("give it a batch as sample=(inputs, targets)", lambda w: pipeline(w, layers))
    failing("3 layers into 4 stages", lambda w: pipeline(w, layers), 4)  # before it is measured
    failing(
        "bytes a rank would do",
        lambda w: pipeline(w, layers, sample=batch(), memory_limit=10),
    )
    failing(
        'memory_limit is for partition="balanced"',
        lambda w: barepp.Pipeline(w, layers, cross_entropy, memory_limit=10),
    )


def test_by_hand_it_is_a_list_for_the_pipeline() -> None:
    costs = barepp.profile(sleepy_layers(), cross_entropy, *batch(), budget_s=0)
    sizes = barepp.balance(costs, barepp.make_schedule("1f1b", 3, 8))
    assert sizes == [2, 1, 3]
    with pytest.raises(UsageError, match=r"barepp\.balance makes a list of it"):
        partition(6, 3, "balanced")
