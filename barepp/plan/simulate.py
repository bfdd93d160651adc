"""Predicts when every action of an order runs, from what each costs.

The model: a rank runs its list in order, one action at a time, each as soon as the previous one has
ended and what it needs has arrived. A result is on its way to another rank for `transfer`, and
neither its sender nor its receiver is busy with it meanwhile (isend does not wait).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from barepp.errors import ScheduleError, UsageError
from barepp.plan.timeline import Timeline
from barepp.program.actions import Kind, Order
from barepp.program.dry_run import Number, dry_run

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
        forward = for_each_stage("forward cost", self.forward, num_stages)
        inputs = for_each_stage("backward_input cost", self.backward_input, num_stages)
        weights = for_each_stage("backward_weight cost", self.backward_weight, num_stages)
        _check("transfer cost", self.transfer)
        full = [a + b for a, b in zip(inputs, weights, strict=True)]
        return {Kind.F: forward, Kind.B: full, Kind.I: inputs, Kind.W: weights}


def simulate(order: Order, num_stages: int, costs: Costs) -> Timeline:
    """Return when each action of `order` starts and ends; time 0 is when the first may start."""
    spans = dry_run(order, num_stages, costs.per_stage(num_stages), costs.transfer)
    if any(len(row) < len(actions) for row, actions in zip(spans, order, strict=True)):
        raise ScheduleError("this order never ends: validate() shows where it is stuck")
    return Timeline(spans)


def for_each_stage(name: str, cost: Cost, num_stages: int) -> list[Number]:
    """Return one number for each stage, checked."""
    each = list(cost) if isinstance(cost, Sequence) else [cost] * num_stages
    if len(each) != num_stages:
        raise UsageError(f"the {name}s are for {len(each)} stages, but there are {num_stages}")
    for one in each:
        _check(name, one)
    return each


def _check(name: str, cost: Number) -> None:
    if not (isinstance(cost, Fraction) or math.isfinite(cost)) or cost < 0:
        raise UsageError(f"a cost is a number from 0 up; the {name} is {cost}")
