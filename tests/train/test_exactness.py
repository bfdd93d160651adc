"""Exactness is the specification: schedule and number of ranks change no bit of what is learnt.

Over inproc, where the ranks are threads, a run takes a tenth of a second: each schedule runs in
each world, what goes with them (microbatches, stages a rank, partition, recompute) is drawn, from a
fixed seed, or such that any two values meet (covering.py). Over sockets each schedule runs once in
each of its worlds, over one transport or another.
"""

import hashlib
from functools import lru_cache, partial
from itertools import pairwise
from random import Random

import monolith
import pytest
import torch
import zoo
from covering import every_pair
from torch import nn
from torch.nn import functional
from zoo import ZOO, Model, linear

import barepp
from barepp.plan.simulate import Costs, simulate
from barepp.train.stage.recompute import RECOMPUTE
from barepp.train.stage.seeding import derive_seed

SEED = 3
LAYERS, HIDDEN = 16, 24  # and the head: 17 layers, so at most 17 ranks
WORLDS = [1, 2, 3, 4, 5, 17]
SCHEDULES = barepp.schedule_names()
TWO_STAGES_A_RANK = ("interleaved_1f1b", "zb_v")  # when nobody says
ROWS = [20, 13, 20]  # a smaller batch, and a larger one after it
MICROBATCHES = [1, 2, 3, 8, 30]  # 30: more than any batch has rows

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def data(model: Model, rows: list[int]) -> Batches:
    return [zoo.data(model, count, step) for step, count in enumerate(rows)]


MLP = Model(barepp.mlp(LAYERS, HIDDEN), (64,), num_classes=10)


# -- the reference: a dozen lines of plain torch ---------------------------------------------------


@lru_cache
def plain_torch(num_microbatches: int) -> tuple[list[float], str]:
    model = nn.Sequential()
    for index, builder in enumerate(MLP.layers):
        torch.manual_seed(derive_seed(SEED, "init", index))
        model.append(builder())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for inputs, targets in data(MLP, ROWS):
        optimizer.zero_grad()
        count = min(num_microbatches, len(inputs))
        total = torch.zeros(())
        for x, y in zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True):
            loss = functional.cross_entropy(model(x), y) * (len(y) / len(targets))
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total.item())
    return losses, sha256(model.parameters())


def sha256(parameters) -> str:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(as_bytes(parameter))
    return digest.hexdigest()


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


# -- what is compared with it ----------------------------------------------------------------------


def train(
    world: barepp.World,
    model: Model,
    schedule: str,
    num_microbatches: int,
    partition: str | list[int] = "uniform",
    **options: object,
) -> tuple[list[float], str, int, dict[str, bytes]]:
    pipe = barepp.Pipeline(
        world,
        model.layers,
        functional.cross_entropy,
        schedule=schedule,
        num_microbatches=num_microbatches,
        partition=partition,
        seed=SEED,
        **options,
    )
    parameters = list(pipe.parameters())
    # AdamW with decay tells a weight without a gradient from one with zeros; the MLP has Adam,
    # as the reference has. A stage of layers without weights has nothing to optimise.
    kind = torch.optim.Adam if model is MLP else partial(torch.optim.AdamW, weight_decay=1)
    optimizer = kind(parameters, lr=0.01) if parameters else None
    losses = []
    for inputs, targets in data(model, ROWS):
        pipe.zero_grad()
        first, last = world.rank == 0, world.rank == pipe.last_rank
        loss = pipe.step(inputs if first else None, targets if last else None)
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.item())
    state = {name: as_bytes(tensor) for name, tensor in pipe.state_dict().items()}
    return losses, pipe.parameters_sha256(), pipe.peak_in_flight, state


@pytest.mark.parametrize("num_microbatches", MICROBATCHES)
def test_the_monolith_gives_the_bits_of_plain_torch(num_microbatches: int) -> None:
    model = monolith.build(LAYERS, HIDDEN, SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for inputs, targets in data(MLP, ROWS):
        optimizer.zero_grad()
        losses.append(monolith.step(model, inputs, targets, num_microbatches).item())
        optimizer.step()
    expected = plain_torch(num_microbatches)
    assert losses == expected[0]
    assert sha256(model.parameters()) == monolith.parameters_sha256(model) == expected[1]


# Worlds of 5 and 17 ranks show what a schedule's shape has to do with the number of ranks; what is
# new in the later schedules (I and W, several stages a rank) the small worlds show.
def in_the_grid(world_size: int, schedule: str, *_: object) -> bool:
    return world_size <= 4 or schedule in ("naive", "gpipe", "1f1b")


def over_sockets(world_size: int, schedule: str, transport: str) -> bool:
    if transport == "gloo":  # (the others pass too; each costs half a second)
        return world_size == 4
    first = schedule in ("naive", "gpipe", "1f1b")
    return world_size in (2, 4) or (first and in_the_grid(world_size, schedule))


def peaks(schedule: str, world_size: int, num_microbatches: int) -> list[int]:
    """The most stage forwards that each rank keeps: in theory, or as `plan` predicts it."""
    m, p = num_microbatches, world_size
    theory = {"naive": [1] * p, "gpipe": [m] * p, "1f1b": [min(m, p - r) for r in range(p)]}
    num_stages = p * (1 + (schedule in TWO_STAGES_A_RANK))
    order = barepp.make_schedule(schedule, num_stages, m, p).order
    return theory.get(schedule) or simulate(order, num_stages, Costs()).peak_in_flight


@pytest.mark.parametrize(
    ("world_size", "schedule", "num_microbatches"),
    every_pair(WORLDS, SCHEDULES, MICROBATCHES, where=in_the_grid),
)
def test_every_schedule_on_any_number_of_ranks_gives_the_bits_of_plain_torch(
    world_size: int, schedule: str, num_microbatches: int
) -> None:
    results = barepp.run(train, world_size, MLP, schedule, num_microbatches, transport="inproc")
    most = min(num_microbatches, max(ROWS))
    expected = peaks(schedule, world_size, most)
    for rank, (losses, parameters_sha256, peak_in_flight, _) in enumerate(results):
        assert (losses, parameters_sha256) == plain_torch(num_microbatches), f"rank {rank}"
        assert peak_in_flight == expected[rank], f"rank {rank}"


@pytest.mark.parametrize(
    ("world_size", "schedule", "transport"),
    every_pair(WORLDS, SCHEDULES, ["tcp", "shm", "gloo"], where=over_sockets),
)
def test_processes_give_the_bits_of_plain_torch(
    transport: str, world_size: int, schedule: str
) -> None:
    def work(world: barepp.World) -> tuple[list[float], str]:  # not importable: forked from here
        return train(world, MLP, schedule, 8)[:2]

    assert barepp.run(work, world_size, transport=transport) == [plain_torch(8)] * world_size


@pytest.mark.parametrize("partition", [[14, 1, 2], [1, 1, 15], [3, 13, 1]])
def test_any_partition_gives_the_bits_of_plain_torch(partition: list[int]) -> None:
    results = barepp.run(train, 3, MLP, "1f1b", 8, partition, transport="inproc")
    assert [result[:2] for result in results] == [plain_torch(8)] * 3


def drawn_partition(random: Random, num_layers: int, num_stages: int) -> list[int]:
    cuts = [0, *sorted(random.sample(range(1, num_layers), num_stages - 1)), num_layers]
    return [b - a for a, b in pairwise(cuts)]


STAGES = [
    (schedule, world_size, stages_per_rank)
    for schedule in SCHEDULES
    for world_size in (1, 2, 3, 4)
    for stages_per_rank in {"interleaved_1f1b": (1, 2, 3, 4), "zb_v": (2,)}.get(schedule, (1,))
]


@pytest.mark.parametrize(("schedule", "world_size", "stages_per_rank"), STAGES)
def test_stages_a_rank_partition_and_recompute_do_not_matter(
    schedule: str, world_size: int, stages_per_rank: int
) -> None:
    random = Random(f"{schedule} {world_size} {stages_per_rank}")
    num_stages = world_size * stages_per_rank
    for recompute in ("off", "all", "all_but_last", [*random.choices(RECOMPUTE, k=num_stages)]):
        count = random.choice(MICROBATCHES)
        partition = drawn_partition(random, LAYERS + 1, num_stages)
        options = {"num_stages": num_stages, "recompute": recompute}
        work = partial(train, **options)
        results = barepp.run(work, world_size, MLP, schedule, count, partition, transport="inproc")
        for result in results:
            assert result[:2] == plain_torch(count), f"{partition}, {count}, {recompute}"


# -- one step's gradients are those of the batch ---------------------------------------------------


def gradients_of_one_step(
    world: barepp.World, schedule: str, num_microbatches: int, batch: tuple
) -> dict[str, torch.Tensor]:
    pipe = barepp.Pipeline(
        world,
        barepp.mlp(),
        functional.cross_entropy,
        schedule=schedule,
        num_microbatches=num_microbatches,
        seed=SEED,
    )
    pipe.step(*batch)
    return {name: parameter.grad for name, parameter in pipe.named_parameters()}


@pytest.mark.parametrize("num_microbatches", [1, 3, 8, 30])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_steps_gradients_are_those_of_the_whole_batch(
    schedule: str, num_microbatches: int
) -> None:
    inputs, targets = batch = data(MLP, [20])[0]
    model = monolith.build(16, 128, SEED)
    functional.cross_entropy(model(inputs), targets).backward()
    parts = barepp.run(
        gradients_of_one_step, 4, schedule, num_microbatches, batch, transport="inproc"
    )
    found = {name: gradient for part in parts for name, gradient in part.items()}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        error = (found[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e}"


# -- models that draw random numbers, and all others that are hard to cut -------------------------

NORM_AND_DROPOUT = Model(
    [
        linear(12, 20),
        partial(nn.LayerNorm, 20),
        partial(nn.Dropout, 0.3),
        nn.GELU,
        linear(20, 20),
        partial(nn.LayerNorm, 20),
        partial(nn.Dropout, 0.5),
        linear(20, 5),
    ],
    (12,),
)
HARD = {"norm and dropout": NORM_AND_DROPOUT, **ZOO}


@lru_cache
def one_rank(name: str) -> tuple[list[float], str, dict[str, bytes]]:
    [result] = barepp.run(train, 1, HARD[name], "naive", 3, transport="inproc")
    return result[0], result[1], result[3]


def stages_for(name: str, schedule: str, ranks: int | None) -> tuple[int, int]:
    """Return how many ranks and stages there are; None is as many ranks as the layers allow."""
    stages_per_rank = 1 + (schedule in TWO_STAGES_A_RANK)
    world_size = ranks or len(HARD[name].layers) // stages_per_rank
    return world_size, world_size * stages_per_rank


@pytest.mark.parametrize(
    ("name", "schedule", "ranks"),
    every_pair(
        list(HARD),
        SCHEDULES,
        [2, 3, None],
        where=lambda name, *case: stages_for(name, *case)[1] <= len(HARD[name].layers),
    ),
)
def test_a_model_that_is_hard_to_cut_gives_the_bits_of_one_rank(
    name: str, schedule: str, ranks: int | None
) -> None:
    model, random = HARD[name], Random(f"{name} {schedule} {ranks}")
    world_size, num_stages = stages_for(name, schedule, ranks)
    partition = drawn_partition(random, len(model.layers), num_stages)
    recompute = random.choice(RECOMPUTE)
    work = partial(train, num_stages=num_stages, recompute=recompute)
    results = barepp.run(work, world_size, model, schedule, 3, partition, transport="inproc")
    state = {key: value for result in results for key, value in result[3].items()}
    for losses, parameters_sha256, _, _ in results:
        found = (losses, parameters_sha256, state)
        assert found == one_rank(name), f"{partition} on {world_size} ranks, {recompute}"


# -- a weight that several layers of a stage use ---------------------------------------------------


class Using(nn.Module):
    """A layer that multiplies by a weight that it may not have alone, `times` times."""

    def __init__(self, weight: nn.Parameter, times: int) -> None:
        super().__init__()
        self.weight = weight
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = torch.tanh(x @ self.weight.t())  # [rows, 9]
        return x


def repeated() -> Model:
    """Layers 2, 4 and 5 have one weight between them: they belong into one stage.

    New at each call: the weight exists before the layers do, and is trained.
    """
    generator = torch.Generator().manual_seed(8)
    weight = nn.Parameter(torch.randn(9, 9, generator=generator))
    once, twice = partial(Using, weight, 1), partial(Using, weight, 2)
    front = [linear(12, 9), partial(nn.LayerNorm, 9)]
    return Model(
        [*front, twice, partial(nn.Dropout, 0.2), once, once, linear(9, 9), nn.GELU, linear(9, 5)],
        (12,),
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_repeated_parameter_within_a_stage_gives_the_bits_of_one_rank(schedule: str) -> None:
    [expected] = barepp.run(train, 1, repeated(), "naive", 3, transport="inproc")
    for num_stages, sizes in ((2, [1, 8]), (2, [6, 3]), (4, [1, 5, 2, 1]), (4, [2, 4, 1, 2])):
        world_size = num_stages // (1 + (schedule in TWO_STAGES_A_RANK))
        for recompute in ("off", "all"):
            work = partial(train, num_stages=num_stages, recompute=recompute)
            results = barepp.run(
                work, world_size, repeated(), schedule, 3, sizes, transport="inproc"
            )
            state = {key: value for result in results for key, value in result[3].items()}
            assert state == expected[3], f"{sizes}, {recompute}"
            assert {result[1] for result in results} == {expected[1]}


# -- a partition that was measured -----------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_balanced_partition_gives_the_bits_of_plain_torch(schedule: str, world_size: int) -> None:
    """Whatever it comes to: measured times are not the same from run to run."""
    recompute = Random(f"{schedule} {world_size}").choice(RECOMPUTE)
    work = partial(train, recompute=recompute, sample=data(MLP, [20])[0])
    results = barepp.run(work, world_size, MLP, schedule, 3, "balanced", transport="inproc")
    assert [result[:2] for result in results] == [plain_torch(3)] * world_size


@pytest.mark.parametrize("name", HARD)
def test_a_model_that_is_hard_to_cut_can_be_balanced(name: str) -> None:
    model, random = HARD[name], Random(name)
    schedule = random.choice(SCHEDULES)
    num_stages = 2 * (1 + (schedule in TWO_STAGES_A_RANK))
    work = partial(train, num_stages=num_stages, sample=data(model, [20])[0])
    results = barepp.run(work, 2, model, schedule, 3, "balanced", transport="inproc")
    state = {key: value for result in results for key, value in result[3].items()}
    for losses, parameters_sha256, _, _ in results:
        assert (losses, parameters_sha256, state) == one_rank(name), schedule
