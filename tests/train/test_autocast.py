"""Autocast in a pipeline: the bits of one process under autocast, however the model is cut."""

from __future__ import annotations

import threading
from functools import lru_cache, partial
from random import Random

import pytest
import torch
from covering import every_pair
from test_exactness import (
    HARD,
    MICROBATCHES,
    MLP,
    ROWS,
    SCHEDULES,
    SEED,
    TWO_STAGES_A_RANK,
    Using,
    data,
    drawn_partition,
    repeated,
    sha256,
    train,
)
from torch import nn
from torch.nn import functional
from zoo import Model, layer, linear

import barepp
from barepp.train.layer_profiler import profile
from barepp.train.stage.recompute import RECOMPUTE
from barepp.train.stage.seeding import Compute, derive_seed
from barepp.train.stage.stage import Stage

HALVES = [torch.bfloat16, torch.float16]


class Twice(nn.Module):
    """Uses its input in two matrix products: under autocast it is converted for each."""

    plain = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.Linear(width, width)
        self.right = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) * torch.tanh(self.right(x))  # [rows, width]


# Behind a matrix product all is in half precision; there has to be something to convert.
WHOLE = layer(lambda x: x.float().sin())
FORKED = Model(
    [linear(12, 9), WHOLE, partial(Twice, 9), WHOLE, partial(Twice, 9), nn.GELU, linear(9, 5)],
    (12,),
)


def build(model: Model) -> nn.Sequential:
    built = nn.Sequential()
    for index, builder in enumerate(model.layers):
        torch.manual_seed(derive_seed(SEED, "init", index))
        built.append(builder())
    return built


def plainly(model: Model, num_microbatches: int, dtype: torch.dtype) -> tuple[list[float], str]:
    """The same training in one process, as torch's manual says that autocast is used."""
    built = build(model)
    kind = torch.optim.Adam if model is MLP else partial(torch.optim.AdamW, weight_decay=1)
    optimizer = kind(built.parameters(), lr=0.01)
    losses = []
    for inputs, targets in data(model, ROWS):
        optimizer.zero_grad()
        count = min(num_microbatches, len(inputs))
        total = torch.zeros(())
        for x, y in zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True):
            with torch.autocast("cpu", dtype):
                loss = functional.cross_entropy(built(x), y) * (len(y) / len(targets))
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total.item())
    return losses, sha256(built.parameters())


plain_mlp = lru_cache(partial(plainly, MLP))


@pytest.mark.parametrize(
    ("schedule", "world_size", "count", "dtype"),
    every_pair(
        SCHEDULES,
        [1, 2, 3, 4],
        MICROBATCHES,
        HALVES,
        # (Each halves the same way: of float16 two counts are enough.)
        where=lambda _, __, count, dtype: dtype is HALVES[0] or count in MICROBATCHES[1:3],
    ),
)
def test_every_schedule_gives_the_bits_of_one_process_under_autocast(
    schedule: str, world_size: int, count: int, dtype: torch.dtype
) -> None:
    recompute = Random(f"{schedule} {world_size} {count}").choice(RECOMPUTE)
    work = partial(train, autocast=dtype, recompute=recompute)
    results = barepp.run(work, world_size, MLP, schedule, count, transport="inproc")
    for result in results:
        assert result[:2] == plain_mlp(count, dtype), recompute


def test_autocast_changes_the_numbers_at_all() -> None:
    assert len({plain_mlp(8, dtype)[1] for dtype in HALVES}) == 2
    [full] = barepp.run(train, 1, MLP, "naive", 8, transport="inproc")
    assert full[1] not in {plain_mlp(8, dtype)[1] for dtype in HALVES}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_input_that_is_used_twice_is_converted_twice_wherever_the_cut_falls(
    schedule: str,
) -> None:
    """A bug that would be: autocast keeps the conversion of a leaf that requires a gradient, for
    weights. What enters a stage is such a leaf, and both uses would add their gradients in half
    precision, where one process adds them in float32."""
    expected = plainly(FORKED, 3, torch.bfloat16)
    for world_size in (1, 2, 3):
        num_stages = world_size * (1 + (schedule in TWO_STAGES_A_RANK))
        for sizes in ([2, 5], [4, 3], [2, 2, 3], [2, 1, 1, 3], [1, 1, 1, 1, 1, 2]):
            if len(sizes) != num_stages:
                continue
            work = partial(train, autocast=torch.bfloat16, num_stages=num_stages)
            results = barepp.run(work, world_size, FORKED, schedule, 3, sizes, transport="inproc")
            assert [result[:2] for result in results] == [expected] * world_size, sizes


@pytest.mark.parametrize("name", HARD)
def test_a_model_that_is_hard_to_cut_gives_the_bits_of_one_rank(name: str) -> None:
    model = HARD[name]
    mixed = partial(train, autocast=torch.bfloat16)
    [alone] = barepp.run(mixed, 1, model, "naive", 3, transport="inproc")
    for schedule in SCHEDULES:
        random = Random(f"{name} {schedule}")
        num_stages = 2 * (1 + (schedule in TWO_STAGES_A_RANK))
        partition = drawn_partition(random, len(model.layers), num_stages)
        work = partial(mixed, num_stages=num_stages, recompute=random.choice(RECOMPUTE))
        results = barepp.run(work, 2, model, schedule, 3, partition, transport="inproc")
        state = {key: value for result in results for key, value in result[3].items()}
        for losses, parameters_sha256, _, _ in results:
            found = (losses, parameters_sha256, state)
            assert found == (alone[0], alone[1], alone[3]), f"{schedule}, {partition}"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_repeated_parameter_is_converted_once_a_microbatch_as_in_one_process(
    schedule: str,
) -> None:
    """Its uses add their gradients in half precision then, also where a backward is split."""
    [alone] = barepp.run(
        partial(train, autocast=torch.bfloat16), 1, repeated(), "naive", 3, transport="inproc"
    )
    for num_stages, sizes in ((2, [1, 8]), (2, [6, 3]), (4, [1, 5, 2, 1])):
        world_size = num_stages // (1 + (schedule in TWO_STAGES_A_RANK))
        for recompute in ("off", "all"):
            options = {"num_stages": num_stages, "recompute": recompute}
            work = partial(train, autocast=torch.bfloat16, **options)
            results = barepp.run(
                work, world_size, repeated(), schedule, 3, sizes, transport="inproc"
            )
            state = {key: value for result in results for key, value in result[3].items()}
            assert state == alone[3], f"{sizes}, {recompute}"


def test_a_repeated_parameter_gives_the_bits_of_plain_torch() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = nn.Parameter(torch.randn(9, 9, generator=generator))
    same = [partial(Using, weight, 1), partial(Using, weight, 2)]
    model = Model([linear(12, 9), *same, nn.GELU, linear(9, 5)], (12,))
    before = weight.detach().clone()
    expected = plainly(model, 3, torch.bfloat16)
    for schedule in ("1f1b", "zb_h1"):
        with torch.no_grad():
            weight.copy_(before)
        weight.grad = None
        work = partial(train, autocast=torch.bfloat16)
        results = barepp.run(work, 2, model, schedule, 3, [4, 1], transport="inproc")
        assert [result[:2] for result in results] == [expected] * 2


def test_ranks_that_are_threads_take_turns_under_autocast() -> None:
    """torch's converted weights are the process's: whoever leaves autocast throws them all away."""
    lock, seen = threading.Lock(), []

    class Looking(nn.Linear):
        plain = True  # nothing random: without autocast there is nothing to take turns for

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(lock.locked())
            return super().forward(x)

    layers = [partial(Looking, 4, 4)]
    for autocast in (None, torch.bfloat16):
        for recompute in (False, True):
            compute = Compute(autocast=autocast, lock=lock)
            stage = Stage(0, range(1), 2, layers, nn.MSELoss(), seed=0, compute=compute)
            stage.forward(0, torch.ones(2, 4), step=0, recompute=recompute)
            dtype = torch.float32 if autocast is None else autocast
            stage.backward(0, torch.ones(2, 4, dtype=dtype))
    assert seen == [False] * 3 + [True] * 3


def test_activations_travel_in_the_precision_that_they_have() -> None:
    def sent(world: barepp.World, autocast: torch.dtype | None) -> int:
        pipe = barepp.Pipeline(
            world, MLP.layers, functional.cross_entropy, num_microbatches=2, autocast=autocast
        )
        before = world.transport.traffic.sent_nbytes
        pipe.step(*data(MLP, [20])[0])
        return world.transport.traffic.sent_nbytes - before

    halves, whole = (
        barepp.run(sent, 2, autocast, transport="inproc") for autocast in (torch.bfloat16, None)
    )
    # Rank 0 sends activations, rank 1 their gradients; what else they send is not of the layers.
    rows, width = 20, 24
    assert [more - less for more, less in zip(whole, halves, strict=True)] == [rows * width * 2] * 2


def test_forward_and_evaluate_are_under_autocast_too() -> None:
    inputs, targets = data(MLP, [20])[0]
    built = build(MLP)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = built(inputs)
        loss = functional.cross_entropy(output, targets)

    def work(world: barepp.World) -> tuple[torch.Tensor | None, torch.Tensor]:
        pipe = barepp.Pipeline(
            world,
            MLP.layers,
            functional.cross_entropy,
            num_microbatches=1,
            seed=SEED,
            autocast=torch.bfloat16,
        )
        found = pipe.forward(inputs)
        assert found is None or isinstance(found, torch.Tensor)
        return found, pipe.evaluate(inputs, targets)

    (nothing, one), (found, other) = barepp.run(work, 2, transport="inproc")
    assert nothing is None
    assert found.dtype == output.dtype == torch.bfloat16
    assert torch.equal(found, output)
    assert one == other == loss


def test_layers_are_profiled_as_they_will_run() -> None:
    seen = []

    class Seen(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(super().forward(x).dtype)
            return super().forward(x)

    layers = [partial(Seen, 4, 4), partial(Seen, 4, 4)]
    batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
    costs = profile(layers, functional.cross_entropy, *batch, budget_s=0.0, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert costs[0].output_nbytes == 3 * 4 * 2


@pytest.mark.parametrize("wrong", [torch.float32, torch.int8, "bf16", True])
def test_another_precision_is_refused(wrong: object) -> None:
    world = barepp.init()
    with world, pytest.raises(barepp.UsageError, match=r"bfloat16 or torch\.float16, or None"):
        barepp.Pipeline(world, MLP.layers, functional.cross_entropy, autocast=wrong)
