"""Predicts when every action of an order runs, from what each costs.

The model: a rank runs its list in order, one action at a time, each as soon as the previous one has
ended and what it needs has arrived. A result is on its way to another rank for `transfer`, and
neither its sender nor its receiver is busy with it meanwhile (isend does not wait).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

from barepp.errors import ScheduleError, UsageError
from barepp.plan.timeline import SpanRow, Timeline
from barepp.program.actions import Kind, Order
from barepp.program.dry_run import Number, dry_run
from barepp.program.packed import packed

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
    rows = [packed(actions) for actions in order]
    cost = costs.per_stage(num_stages)
    unit = _unit(cost, costs.transfer)
    if unit is not None:
        # Whole numbers of the smallest unit: as exact as Fractions, and as fast as integers.
        cost = {kind: [int(one / unit) for one in each] for kind, each in cost.items()}
    transfer = costs.transfer if unit is None else int(costs.transfer / unit)
    longest = sum(map(len, rows)) * (max(map(max, cost.values())) + transfer)
    typecode = "d" if unit is None else "q" if longest < 1 << 63 else ""
    starts, ends = dry_run(rows, num_stages, cost, transfer, typecode)
    if any(len(row) < len(actions) for row, actions in zip(ends, rows, strict=True)):
        raise ScheduleError("this order never ends: validate() shows where it is stuck")
    return Timeline(
        SpanRow(*columns, 1 if unit is None else unit)
        for columns in zip(rows, starts, ends, strict=True)
    )


def _unit(cost: dict[Kind, list[Number]], transfer: Number) -> int | Fraction | None:
    """Return a number of which all costs are whole multiples; None if one of them is a float."""
    bottom = 1
    for number in chain([transfer], *cost.values()):
        if isinstance(number, float):
            return None
        bottom = math.lcm(bottom, number.denominator)
    return 1 if bottom == 1 else Fraction(1, bottom)


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
