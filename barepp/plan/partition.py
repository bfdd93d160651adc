"""Cut a row of layers into stages: which layers does each stage hold?

partition(17, 4)                 stage 0: layers 0–4     5 layers, the remainder goes first
                                 stage 1: layers 5–8     4
                                 stage 2: layers 9–12    4
                                 stage 3: layers 13–16   4
partition(17, 4, [3, 5, 5, 4])   the same, with sizes chosen by hand
"""

from collections.abc import Sequence
from itertools import accumulate

from barepp.errors import PartitionError

PARTITIONS = ("uniform", "balanced")


def partition(
    num_layers: int, num_stages: int, how: str | Sequence[int] = "uniform"
) -> list[range]:
    """Return the range of layers of each stage; together they hold every layer exactly once.

    `how` is "uniform", or the number of layers of each stage. (A "balanced" partition depends on
    what the layers cost: balance.py.)
    """
    check_counts(num_layers, num_stages)
    if isinstance(how, str):
        check_name(how)
        if how == "balanced":
            raise PartitionError(
                "a balanced partition needs to know what the layers cost: barepp.balance makes a "
                "list of it"
            )
        sizes = uniform_sizes(num_layers, num_stages)
    else:
        sizes = list(how)
        _check_sizes(sizes, num_layers, num_stages)
    stops = list(accumulate(sizes))
    return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def check_counts(num_layers: int, num_stages: int) -> None:
    """Raise a PartitionError unless every stage can get a layer."""
    if num_stages < 1:
        raise PartitionError(f"cannot cut a model into {num_stages} stages; ask for at least 1")
    if num_layers < num_stages:
        raise PartitionError(
            f"cannot cut {num_layers} layers into {num_stages} stages, since each stage needs at "
            f"least one: use at most {num_layers} stages, or a model of at least {num_stages} "
            "layers"
        )


def check_name(how: str) -> None:
    """Raise a PartitionError if no rule is called that."""
    if how not in PARTITIONS:
        known = ", ".join(PARTITIONS)
        raise PartitionError(
            f"unknown partition {how!r}; there is: {known}, "
            "or a list with the number of layers of each stage"
        )


def uniform_sizes(total: int, parts: int) -> list[int]:
    """Share `total` out as evenly as whole numbers allow, the larger shares first."""
    share, remainder = divmod(total, parts)
    return [share + (part < remainder) for part in range(parts)]


def _check_sizes(sizes: list[int], num_layers: int, num_stages: int) -> None:
    # bool is an int to Python, but [True, True] is no list of sizes to a person.
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise PartitionError(f"partition {sizes} must hold whole numbers, one for each stage")
    if len(sizes) != num_stages:
        raise PartitionError(
            f"partition {sizes} has {len(sizes)} numbers, but there are {num_stages} stages: "
            "give one number of layers for each stage"
        )
    if min(sizes) < 1:
        raise PartitionError(
            f"partition {sizes} gives stage {sizes.index(min(sizes))} {min(sizes)} layers: "
            "each stage needs at least 1"
        )
    if sum(sizes) != num_layers:
        raise PartitionError(
            f"partition {sizes} adds up to {sum(sizes)}, but the model has {num_layers} layers: "
            "the numbers must add up to that"
        )
