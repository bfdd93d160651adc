"""What any slice of the layers costs as a stage of a schedule, in seconds and bytes.

1. Times add up. A schedule that splits backwards pays for both parts, any other for a whole one; a
   stage that recomputes pays for one forward more.
2. A stage needs four times its parameters (themselves, their gradients, Adam's two averages), and
   what a forward keeps times the most microbatches in flight; where it recomputes, its input so
   many times and what one forward keeps.
3. Transfers cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from barepp.plan.simulate import Costs, simulate
from barepp.program.actions import Kind
from barepp.program.lowering import placement
from barepp.schedules import Schedule

STATE_FACTOR: Final = 4  # bytes for each byte of a parameter: itself, its gradient, Adam's averages


class LayerCost(NamedTuple):
    """What one layer costs for one microbatch.

    Attributes:
        forward_s: its forward, in seconds.
        backward_s: its backward, whole.
        backward_input_s, backward_weight_s: its backward in two parts, which are often more.
        kept_nbytes: what stays in memory from a microbatch's forward to its backward.
        output_nbytes: what would cross a cut behind it.
        parameter_nbytes: its parameters.
    """

    forward_s: float
    backward_s: float
    backward_input_s: float
    backward_weight_s: float
    kept_nbytes: int = 0
    output_nbytes: int = 0
    parameter_nbytes: int = 0


def stage_costs(
    layers: Sequence[LayerCost],
    sizes: Sequence[int],
    schedule: Schedule,
    recomputed: Sequence[bool] = (),
) -> Costs:
    """Return the costs of stages of that many layers each, in seconds, for `simulate`."""
    return StageCosts(layers, schedule, recomputed).of_each(sizes)


class StageCosts:
    """The costs of stages, for one schedule; `recomputed` says which run their forwards again."""

    def __init__(
        self, layers: Sequence[LayerCost], schedule: Schedule, recomputed: Sequence[bool] = ()
    ) -> None:
        self._schedule = schedule
        self._again = list(recomputed) or [False] * schedule.num_stages
        self.held: list[list[int]] = [[] for _ in schedule.order]  # by rank: its stages
        for stage, rank in placement(schedule.order).items():
            self.held[rank].append(stage)
        self._peaks, split = _peaks(schedule)
        parts = [
            (one.backward_input_s, one.backward_weight_s) if split else (one.backward_s, 0.0)
            for one in layers
        ]
        # Sums over the first n layers: a slice's sum is then one subtraction.
        self._forward = [0.0, *accumulate(one.forward_s for one in layers)]
        self._inputs = [0.0, *accumulate(inputs for inputs, _ in parts)]
        self._weights = [0.0, *accumulate(weights for _, weights in parts)]
        self._kept = [0, *accumulate(one.kept_nbytes for one in layers)]
        self._state = [0, *accumulate(STATE_FACTOR * one.parameter_nbytes for one in layers)]
        # Nothing in front of the first layer: a batch is there anyway.
        self._input_nbytes = [0, *(one.output_nbytes for one in layers)]

    def seconds(self, stage: int, start: int, stop: int) -> float:
        """Return what each microbatch takes if the stage holds layers start to stop - 1."""
        return sum(self._parts(stage, start, stop))

    def nbytes(self, stage: int, start: int, stop: int) -> int:
        """Return what it needs at most if it holds them."""
        kept, peak = self._kept[stop] - self._kept[start], self._peaks[stage]
        if self._again[stage]:
            kept += peak * self._input_nbytes[start]
        else:
            kept *= peak
        return kept + self._state[stop] - self._state[start]

    def of_each(self, sizes: Sequence[int]) -> Costs:
        """Return the costs of all stages for `simulate`; `sizes` counts the layers of each."""
        parts = [self._parts(stage, *bounds) for stage, bounds in enumerate(slices(sizes))]
        forward, inputs, weights = map(list, zip(*parts, strict=True))
        return Costs(forward, inputs, weights)

    def ranks_nbytes(self, sizes: Sequence[int]) -> list[int]:
        """Return what each rank needs at most."""
        each = [self.nbytes(stage, *bounds) for stage, bounds in enumerate(slices(sizes))]
        return [sum(each[stage] for stage in held) for held in self.held]

    def makespan(self, sizes: Sequence[int]) -> float:
        """Return how many seconds the schedule would take."""
        return float(simulate(self._schedule.order, len(sizes), self.of_each(sizes)).makespan)

    def _parts(self, stage: int, start: int, stop: int) -> tuple[float, float, float]:
        forward = self._forward[stop] - self._forward[start]
        inputs = self._inputs[stop] - self._inputs[start]
        if self._again[stage]:
            inputs += forward
        return forward, inputs, self._weights[stop] - self._weights[start]


def slices(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return where each stage starts and stops."""
    return list(pairwise([0, *accumulate(sizes)]))


def _peaks(schedule: Schedule) -> tuple[list[int], bool]:
    """Return for each stage the most microbatches in flight, and whether any backward is split."""
    now, most = [0] * schedule.num_stages, [0] * schedule.num_stages
    split = False
    for actions in schedule.order:
        for stage, kind, _ in actions:
            if kind is Kind.F:
                now[stage] += 1
                most[stage] = max(most[stage], now[stage])
            elif kind is not Kind.I:
                now[stage] -= 1
            split = split or kind is Kind.W
    return most, split
