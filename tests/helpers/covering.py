"""Combinations of which any two values meet at least once; the others run with `--matrix=all`.

Most faults that depend on a combination depend on two of its values, so a test of three or more
factors need not run their whole product each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Pair = tuple[tuple[int, int], tuple[int, int]]


def every_pair(*factors: Sequence[Any], where: Callable[..., bool] = lambda *_: True) -> list[Any]:
    """Return the product of the factors for `parametrize`, as far as `where` holds.

    What is not needed for any two values of two factors to meet is marked to run with
    `--matrix=all` alone. The choice is the same each time.
    """
    places = [range(len(factor)) for factor in factors]
    values = {
        at: tuple(factor[i] for factor, i in zip(factors, at, strict=True))
        for at in product(*places)
    }
    allowed = [at for at in values if where(*values[at])]
    chosen = set(covering(allowed))
    rest = pytest.mark.rest
    return [pytest.param(*values[at], marks=() if at in chosen else rest) for at in allowed]


def covering(allowed: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Yield combinations until all pairs that occur have occurred, the most useful one first."""
    left: set[Hashable] = {pair for at in allowed for pair in pairs(at)}
    while left:
        best = max(allowed, key=lambda at: len(left.intersection(pairs(at))))
        left.difference_update(pairs(best))
        yield best


def pairs(at: tuple[int, ...]) -> list[Pair]:
    """Return which values meet in a combination: (factor, value) with (factor, value)."""
    return list(combinations(enumerate(at), 2))
