"""Predicts when every action of an order runs, from what each costs.

The model: a rank runs its list in order, one action at a time, each as soon as the previous one has
ended and what it needs has arrived. A result is on its way to another rank for `transfer`, and
neither its sender nor its receiver is busy with it meanwhile (isend does not wait).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from barepp.actions import Action, Kind, Order
from barepp.dependencies import dependencies, in_dependency_order, result_name
from barepp.errors import ScheduleError, UsageError
from barepp.lowering import placement
from barepp.timeline import Number, Span, Timeline

# One number for every stage alike, or one for each stage.
Cost = Number | Sequence[Number]


@dataclass(frozen=True)
class Costs:
    """What one action takes, for one microbatch; a full backward takes its input and weight parts.

    Only sums and comparisons are made, so ints and Fractions give exact results.
    """

    forward: Cost = 1
    backward_input: Cost = 1
    backward_weight: Cost = 1
    transfer: Number = 0

    def per_stage(self, num_stages: int) -> dict[Kind, list[Number]]:
        """Return the cost of every kind for every stage, checked."""
        forward = _for_each_stage("forward", self.forward, num_stages)
        inputs = _for_each_stage("backward_input", self.backward_input, num_stages)
        weights = _for_each_stage("backward_weight", self.backward_weight, num_stages)
        _check("transfer", self.transfer)
        full = [a + b for a, b in zip(inputs, weights, strict=True)]
        return {Kind.F: forward, Kind.B: full, Kind.I: inputs, Kind.W: weights}


def simulate(order: Order, num_stages: int, costs: Costs) -> Timeline:
    """Return when each action of `order` starts and ends; time 0 is when the first may start."""
    cost = costs.per_stage(num_stages)
    holder = placement(order)
    spans: list[list[Span]] = [[] for _ in order]
    end_of: dict[Action, Number] = {}
    for rank, action in in_dependency_order(order, num_stages):
        start = spans[rank][-1].end if spans[rank] else 0
        for need in dependencies(action, num_stages):
            travel = 0 if holder[need.stage] == rank else costs.transfer
            start = max(start, end_of[need] + travel)
        end = start + cost[action.kind][action.stage]
        end_of[result_name(action)] = end
        spans[rank].append(Span(action, start, end))
    if any(len(row) < len(actions) for row, actions in zip(spans, order, strict=True)):
        raise ScheduleError("this order never ends: validate() shows where it is stuck")
    return Timeline(spans)


def _for_each_stage(name: str, cost: Cost, num_stages: int) -> list[Number]:
    each = list(cost) if isinstance(cost, Sequence) else [cost] * num_stages
    if len(each) != num_stages:
        raise UsageError(f"the {name} costs are for {len(each)} stages, but there are {num_stages}")
    for one in each:
        _check(name, one)
    return each


def _check(name: str, cost: Number) -> None:
    if not (isinstance(cost, Fraction) or math.isfinite(cost)) or cost < 0:
        raise UsageError(f"a cost is a number from 0 up; the {name} cost is {cost}")
