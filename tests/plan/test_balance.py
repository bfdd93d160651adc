"""Balanced partitions: exact where they say so, no worse than where they start, within limits.

What is compared with is every partition there is, so the cases are small and many.
"""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest

from barepp.errors import PartitionError
from barepp.plan.balance import balance
from barepp.plan.layer_costs import LayerCost, StageCosts, stage_costs
from barepp.plan.partition import uniform_sizes
from barepp.plan.simulate import simulate
from barepp.program.actions import Kind
from barepp.schedules import Schedule, make_schedule, schedule_names, usual_stages

ONE_STAGE_A_RANK = ["naive", "gpipe", "1f1b", "zb_h1"]
SEVERAL = ["interleaved_1f1b", "zb_v"]


def drawn_layers(random: Random, count: int) -> list[LayerCost]:
    """Whole numbers of milliseconds, so that sums are exact and ties happen."""
    return [
        LayerCost(
            *(float(random.choice([0, 1, 1, 2, 7])) for _ in range(4)),
            kept_nbytes=random.choice([0, 8, 100]),
            output_nbytes=random.choice([8, 50]),
            parameter_nbytes=random.choice([0, 16, 200]),
        )
        for _ in range(count)
    ]


def every_partition(num_layers: int, num_stages: int) -> list[list[int]]:
    inner = itertools.combinations(range(1, num_layers), num_stages - 1)
    return [[b - a for a, b in itertools.pairwise([0, *cuts, num_layers])] for cuts in inner]


def of_slice(layers: list[LayerCost], sizes: list[int]) -> list[list[LayerCost]]:
    rest = iter(layers)
    return [list(itertools.islice(rest, size)) for size in sizes]


def seconds_of_stages(
    layers: list[LayerCost], sizes: list[int], schedule: Schedule, again: list[bool]
) -> list[float]:
    """What a microbatch takes in each stage, written down a second time, layer by layer."""
    split = schedule.name.startswith("zb")
    found = []
    for stage, part in enumerate(of_slice(layers, sizes)):
        total = 0.0
        for layer in part:
            total += layer.forward_s * (2 if again[stage] else 1)
            whole, parts = layer.backward_s, layer.backward_input_s + layer.backward_weight_s
            total += parts if split else whole
        found.append(total)
    return found


def nbytes_of_ranks(
    layers: list[LayerCost], sizes: list[int], schedule: Schedule, again: list[bool]
) -> list[int]:
    starts = [0, *itertools.accumulate(sizes)]
    found = []
    for actions in schedule.order:
        total = 0
        for stage in {action.stage for action in actions}:
            now = peak = 0
            for action in actions:
                if action.stage == stage:
                    now += (action.kind is Kind.F) - (action.kind in (Kind.B, Kind.W))
                    peak = max(peak, now)
            part = of_slice(layers, sizes)[stage]
            kept = sum(layer.kept_nbytes for layer in part)
            start = starts[stage]
            comes_in = layers[start - 1].output_nbytes if start else 0
            total += kept + peak * comes_in if again[stage] else kept * peak
            total += 4 * sum(layer.parameter_nbytes for layer in part)
        found.append(total)
    return found


def drawn_case(random: Random, names: list[str]) -> tuple[list[LayerCost], Schedule, list[bool]]:
    name, ranks = random.choice(names), random.choice([1, 2, 3])
    stages = usual_stages(name, ranks)
    schedule = make_schedule(name, stages, random.choice([1, 2, 5]), ranks)
    layers = drawn_layers(random, random.randint(stages, 8))
    return layers, schedule, [random.random() < 0.3 for _ in range(stages)]


@pytest.mark.parametrize("seed", range(60))
def test_no_partition_has_a_faster_slowest_stage_and_none_of_those_is_more_even(seed: int) -> None:
    layers, schedule, again = drawn_case(Random(seed), ONE_STAGE_A_RANK)
    found = balance(layers, schedule, recomputed=again)

    def worth(sizes: list[int]) -> tuple[float, float]:
        seconds = seconds_of_stages(layers, sizes, schedule, again)
        return max(seconds), sum(one * one for one in seconds)

    assert worth(found) == min(map(worth, every_partition(len(layers), schedule.num_stages)))


@pytest.mark.parametrize("seed", range(60))
def test_a_memory_limit_is_kept_by_the_fastest_partition_that_can(seed: int) -> None:
    random = Random(seed)
    layers, schedule, again = drawn_case(random, ONE_STAGE_A_RANK)
    partitions = every_partition(len(layers), schedule.num_stages)
    needs = [max(nbytes_of_ranks(layers, sizes, schedule, again)) for sizes in partitions]
    least = min(needs)
    limit = random.choice([least, least, *needs])
    found = balance(layers, schedule, recomputed=again, memory_limit=limit)
    assert max(nbytes_of_ranks(layers, found, schedule, again)) <= limit
    slowest = [
        max(seconds_of_stages(layers, sizes, schedule, again))
        for sizes, need in zip(partitions, needs, strict=True)
        if need <= limit
    ]
    assert max(seconds_of_stages(layers, found, schedule, again)) == min(slowest)
    with pytest.raises(PartitionError, match=f"within {least - 1} bytes: {least} bytes a rank"):
        balance(layers, schedule, recomputed=again, memory_limit=least - 1)


@pytest.mark.parametrize("seed", range(60))
def test_with_several_stages_a_rank_no_layer_is_better_in_another_stage(seed: int) -> None:
    random = Random(seed)
    layers, schedule, again = drawn_case(random, SEVERAL)
    partitions = every_partition(len(layers), schedule.num_stages)
    needs = [max(nbytes_of_ranks(layers, sizes, schedule, again)) for sizes in partitions]
    limit = random.choice([math.inf, *needs])

    def makespan(sizes: list[int]) -> float:
        costs = stage_costs(layers, sizes, schedule, again)
        return simulate(schedule.order, schedule.num_stages, costs).makespan

    try:
        found = balance(layers, schedule, recomputed=again, memory_limit=limit)
    except PartitionError as error:
        enough = int(str(error).split(" bytes a rank")[0].split()[-1])
        assert enough > limit
        even = uniform_sizes(len(layers), schedule.num_stages)
        assert max(nbytes_of_ranks(layers, even, schedule, again)) >= enough
        limit = enough
        found = balance(layers, schedule, recomputed=again, memory_limit=limit)
    assert sum(found) == len(layers) and min(found) >= 1
    assert max(nbytes_of_ranks(layers, found, schedule, again)) <= limit
    even = uniform_sizes(len(layers), schedule.num_stages)
    if max(nbytes_of_ranks(layers, even, schedule, again)) <= limit:
        assert makespan(found) <= makespan(even) * (1 + 1e-12)
    for giving, taking in itertools.permutations(range(len(found)), 2):
        moved = list(found)
        moved[giving] -= 1
        moved[taking] += 1
        if min(moved) and max(nbytes_of_ranks(layers, moved, schedule, again)) <= limit:
            assert makespan(found) <= makespan(moved) * (1 + 1e-12)


def test_a_stage_may_need_more_than_its_share_of_a_ranks_limit() -> None:
    """The first rank has the first stage and the last: 4000 bytes of state, and 40."""
    layers = [LayerCost(1, 2, 1, 1, parameter_nbytes=size) for size in (1000, 10, 10, 10)]
    schedule = make_schedule("zb_v", 4, 4)
    assert balance(layers, schedule, memory_limit=4040) == [1, 1, 1, 1]
    with pytest.raises(PartitionError, match="within 4039 bytes: 4040 bytes a rank would do"):
        balance(layers, schedule, memory_limit=4039)


def test_the_uniform_partition_may_be_the_better_start() -> None:
    """[1, 1, 3, 4] has the fastest slowest stage, no single shift helps, and the V waits for it."""
    layers = [LayerCost(c, 2 * c, c, c) for c in map(float, (1, 1, 7, 1, 1, 7, 2, 1, 1))]
    schedule = make_schedule("zb_v", 4, 4, 2)
    costs = StageCosts(layers, schedule)
    assert costs.makespan(balance(layers, schedule)) <= costs.makespan([3, 2, 2, 2]) == 153


def test_two_heavy_layers_do_not_meet_on_a_rank() -> None:
    """The slowest stage alone does not tell: a rank with two of them is the slowest rank."""
    cost = [1, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1, 1]
    layers = [LayerCost(c, 2 * c, c, c) for c in map(float, cost)]
    schedule = make_schedule("interleaved_1f1b", 4, 8, 2)
    sizes = balance(layers, schedule)
    ranks = [sum(sum(cost[a:b]) for a, b in bounds) for bounds in _of_ranks(sizes)]
    assert max(ranks) <= 9  # of 17 in all


def _of_ranks(sizes: list[int]) -> list[list[tuple[int, int]]]:
    bounds = list(itertools.pairwise([0, *itertools.accumulate(sizes)]))
    return [bounds[0::2], bounds[1::2]]


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize("again", [False, True])
def test_what_simulation_is_told_is_the_sum_of_the_layers(name: str, again: bool) -> None:
    random, stages = Random(name), usual_stages(name, 2)
    schedule = make_schedule(name, stages, 3, 2)
    layers = drawn_layers(random, 7)
    sizes = random.choice(every_partition(7, stages))
    recomputed = [again] * stages
    costs = stage_costs(layers, sizes, schedule, recomputed)
    totals = map(sum, zip(costs.forward, costs.backward_input, costs.backward_weight, strict=True))
    assert list(totals) == seconds_of_stages(layers, sizes, schedule, recomputed)
    assert list(costs.forward) == [
        sum(layer.forward_s for layer in part) for part in of_slice(layers, sizes)
    ]
    found = StageCosts(layers, schedule, recomputed).ranks_nbytes(sizes)
    assert found == nbytes_of_ranks(layers, sizes, schedule, recomputed)


def test_the_picture_of_the_module() -> None:
    layers = [LayerCost(c, 0, 0, 0) for c in (1.0, 1, 1, 1, 1, 1, 8, 1, 1)]
    assert balance(layers, make_schedule("1f1b", 3, 8)) == [6, 1, 2]


def test_equal_layers_are_cut_evenly() -> None:
    layers = [LayerCost(1.0, 2.0, 1.0, 1.0)] * 17
    assert sorted(balance(layers, make_schedule("1f1b", 4, 8)), reverse=True) == [5, 4, 4, 4]


def test_more_stages_than_layers() -> None:
    with pytest.raises(PartitionError, match="2 layers into 3 stages"):
        balance([LayerCost(1, 1, 1, 1)] * 2, make_schedule("1f1b", 3, 8))


def test_a_hundred_layers_take_no_time_to_speak_of() -> None:
    """A bound on the work, not on the clock: how many slices are looked at."""
    looked = 0

    class Counting(StageCosts):
        def seconds(self, stage: int, start: int, stop: int) -> float:
            nonlocal looked
            looked += 1
            return super().seconds(stage, start, stop)

    random = Random(0)
    layers = [LayerCost(random.choice([1.0, 2.0, 3.0]), 0, 0, 0) for _ in range(100)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("barepp.plan.balance.StageCosts", Counting)
        balance(layers, make_schedule("1f1b", 16, 16))
    assert looked < 16 * 100 * 100 / 4
