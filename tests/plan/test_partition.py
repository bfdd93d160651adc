"""Partition: each layer in one stage, in order, none dropped."""

import itertools

import pytest

from barepp.errors import PartitionError
from barepp.plan.partition import partition

GRID = [(layers, stages) for layers in range(1, 25) for stages in range(1, layers + 1)]


@pytest.mark.parametrize(("layers", "stages"), GRID)
def test_uniform_holds_every_layer_once_and_evenly(layers: int, stages: int) -> None:
    ranges = partition(layers, stages)
    sizes = [len(r) for r in ranges]
    assert list(itertools.chain(*ranges)) == list(range(layers))
    assert len(ranges) == stages
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("layers", range(1, 8))
def test_sizes_by_hand_are_kept(layers: int) -> None:
    for stages in range(1, layers + 1):
        for sizes in itertools.product(range(1, layers + 1), repeat=stages):
            if sum(sizes) == layers:
                ranges = partition(layers, stages, sizes)
                assert [len(r) for r in ranges] == list(sizes)
                assert list(itertools.chain(*ranges)) == list(range(layers))


def test_fewer_layers_than_stages_names_both_and_the_remedy() -> None:
    with pytest.raises(PartitionError, match=r"3 layers into 5 stages.*at most 3 stages"):
        partition(3, 5)


def test_no_stages() -> None:
    with pytest.raises(PartitionError, match="0 stages"):
        partition(3, 0)


def test_an_unknown_rule_lists_what_exists() -> None:
    with pytest.raises(PartitionError, match=r"'evenly'; there is: uniform, balanced, or a list"):
        partition(8, 2, "evenly")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([3, 5, 4], r"has 3 numbers, but there are 4 stages"),
        ([3, 5, 4, 5], r"adds up to 17, but the model has 16"),
        ([3, 9, 0, 4], r"gives stage 2 0 layers"),
        ([3, 9, -1, 5], r"gives stage 2 -1 layers"),
        ([], r"has 0 numbers"),
        ([4.0, 4, 4, 4], r"whole numbers"),
        ([True, 5, 5, 5], r"whole numbers"),
    ],
)
def test_wrong_sizes_say_what_is_wrong(sizes: list[int], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        partition(16, 4, sizes)
