"""Runs an order without computing: each action as soon as its rank is free and its needs are here.

The validator asks whether the order ends, the simulator when each action runs. A rank goes through
its own list until a result is missing; that result, when it exists, lets the rank go on.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from barepp.program.actions import Action, Kind, Order
from barepp.program.dependencies import dependencies, result_name
from barepp.program.lowering import placement

Number: TypeAlias = int | float | Fraction


class Span(NamedTuple):
    """One action and the time that it took."""

    action: Action
    start: Number
    end: Number


def dry_run(
    order: Order,
    num_stages: int,
    cost: Mapping[Kind, Sequence[Number]],
    transfer: Number = 0,
) -> list[list[Span]]:
    """Return when each rank's actions run; a rank that is stuck has fewer spans than actions.

    `cost[kind][stage]` is what an action takes, `transfer` what a result takes to another rank.
    """
    holder = placement(order)
    spans: list[list[Span]] = [[] for _ in order]
    ended: dict[Action, Number] = {}  # by `result_name`
    waiting: dict[Action, list[int]] = {}  # the ranks that wait for a result
    ready = list(range(len(order)))
    while ready:
        rank = ready.pop()
        row = spans[rank]
        now: Number = row[-1].end if row else 0
        while len(row) < len(order[rank]):
            action = order[rank][len(row)]
            needs = dependencies(action, num_stages)
            missing = [need for need in needs if need not in ended]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            for need in needs:
                now = max(now, ended[need] + (transfer if holder[need.stage] != rank else 0))
            row.append(Span(action, now, now + cost[action.kind][action.stage]))
            now = row[-1].end
            result = result_name(action)
            ended[result] = now
            ready += waiting.pop(result, [])
    return spans
