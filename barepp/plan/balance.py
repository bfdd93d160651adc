"""Cuts layers into stages by what each costs, so that the slowest stage is as fast as possible.

    layers      1  1  1  1  1  1  8  1  1       what each takes for a microbatch, say in ms
    uniform     1  1  1 |1  1  1 |8  1  1       the slowest of three stages takes 10
    balanced    1  1  1  1  1  1 |8 |1  1       8

1. The slowest stage is as fast as possible. Among the partitions with that slowest stage, the
   sum of the squared stage times is the least, so the stages are the most even. Dynamic programming
   finds both exactly: the best cut of n layers into k stages is some last stage, after the best cut
   of the layers before it into k - 1.
2. A rank that holds several stages is as slow as their sum, and the schedule decides which stages
   it holds. There the search starts from rule 1's partition, or from the uniform one if the
   schedule ends earlier with it. It moves one layer from a stage to another as long as the
   simulated schedule ends earlier. The result is never worse than the start, but not proven best.
3. A memory limit excludes every partition with which some rank needs more (layer_costs.py says
   what a rank needs). If a rank holds several stages, each stage first gets an equal share of it;
   if no partition fits, the search starts from the partition whose largest stage needs least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Final

from barepp.errors import PartitionError
from barepp.plan.layer_costs import LayerCost, StageCosts, slices
from barepp.plan.partition import check_counts, uniform_sizes
from barepp.schedules import Schedule

Cost = Callable[[int, int, int], float]  # (stage, start, stop): of these layers as that stage
_MOST_SIMULATED: Final = 1_000_000  # actions, for rule 2: a few seconds


def balance(
    layers: Sequence[LayerCost],
    schedule: Schedule,
    *,
    recomputed: Sequence[bool] = (),
    memory_limit: float = math.inf,
) -> list[int]:
    """Return how many layers each of the schedule's stages gets.

    `recomputed` says of each stage whether it runs its forwards again; `memory_limit` is in bytes,
    for each rank.

    Raises:
        PartitionError: fewer layers than stages, or no partition was found that keeps to the limit.
            (With one stage a rank, there is none.)
    """
    num_layers, num_stages = len(layers), schedule.num_stages
    check_counts(num_layers, num_stages)
    costs = StageCosts(layers, schedule, recomputed)
    stages_per_rank = max(map(len, costs.held))
    share = memory_limit / stages_per_rank

    def fits(stage: int, start: int, stop: int) -> bool:
        return costs.nbytes(stage, start, stop) <= share

    even = uniform_sizes(num_layers, num_stages)
    cuts = [(stage, *bounds) for stage, bounds in enumerate(slices(even))]
    # No stage of the best partition is slower than the slowest of another one.
    bound = max(costs.seconds(*cut) for cut in cuts) if all(fits(*cut) for cut in cuts) else None
    slowest, _ = _best(num_layers, num_stages, costs.seconds, max, fits=fits, bound=bound)
    if slowest < math.inf:
        _, start = _best(
            num_layers, num_stages, costs.seconds, _add_square, fits=fits, bound=slowest
        )
        if stages_per_rank == 1:
            return start
    else:  # a large stage may still share its rank with a small one
        _, start = _best(num_layers, num_stages, costs.nbytes, max)
    enough = min(max(costs.ranks_nbytes(sizes)) for sizes in (start, even))
    if enough > memory_limit:
        raise _too_little(memory_limit, enough)
    return _shifted([start, even], costs, memory_limit, sum(map(len, schedule.order)))


def _add_square(total: float, cost: float) -> float:
    return total + cost * cost


def _best(
    num_layers: int,
    num_stages: int,
    cost: Cost,
    add: Callable[[float, float], float],
    *,
    fits: Callable[[int, int, int], bool] = lambda *_: True,
    bound: float | None = None,
) -> tuple[float, list[int]]:
    """Return the least that all stages' costs add up to, and the sizes; inf if nothing fits.

    `add(total of the stages before, cost)` is what makes a total. With a `bound` no stage may cost
    more, and costs have to grow with every layer that is added in front.
    """
    # totals[n] is the best total of the first n layers in the stages so far; starts has, for each
    # stage and n, where that stage starts if it stops before layer n.
    totals = [0.0] + [math.inf] * num_layers
    starts: list[list[int]] = []
    for stage in range(num_stages):
        following, begun = [math.inf] * (num_layers + 1), [0] * (num_layers + 1)
        behind = num_stages - 1 - stage  # stages, each of which needs a layer
        for stop in range(stage + 1, num_layers - behind + 1):
            for start in range(stop - 1, stage - 1, -1):
                own = cost(stage, start, stop)
                if bound is not None and own > bound:
                    break
                total = add(totals[start], own)
                if total < following[stop] and fits(stage, start, stop):
                    following[stop], begun[stop] = total, start
        totals = following
        starts.append(begun)
    sizes, stop = [], num_layers
    for begun in reversed(starts):
        sizes.append(stop - begun[stop])
        stop = begun[stop]
    return totals[num_layers], sizes[::-1]


def _shifted(
    starts: Sequence[list[int]], costs: StageCosts, memory_limit: float, num_actions: int
) -> list[int]:
    """Return the best start, with layers shifted as long as that is a gain."""

    def keeps_to_limit(sizes: list[int]) -> bool:
        return min(sizes) > 0 and max(costs.ranks_nbytes(sizes)) <= memory_limit

    best = min(filter(keeps_to_limit, starts), key=costs.makespan)
    earliest = costs.makespan(best)
    left = _MOST_SIMULATED // num_actions  # simulations
    gained = True
    while gained:
        gained = False
        for giving, taking in permutations(range(len(best)), 2):
            moved = list(best)
            moved[giving] -= 1
            moved[taking] += 1
            if left <= 0 or not keeps_to_limit(moved):
                continue
            left -= 1
            if (ends := costs.makespan(moved)) < earliest:
                best, earliest, gained = moved, ends, True
    return best


def _too_little(memory_limit: float, enough: int) -> PartitionError:
    return PartitionError(
        f"no partition was found that keeps every rank within {memory_limit:.0f} bytes: {enough} "
        "bytes a rank would do. Allow that, or use more ranks, smaller microbatches or recompute"
    )
