"""One rank's programs: a schedule lowered for as many microbatches as a step has."""

from __future__ import annotations

from collections.abc import Sequence

from barepp.actions import Kind
from barepp.lowering import Step, lower
from barepp.schedules import Schedule, make_schedule


class Programs:
    """Makes each program once; `of` is asked for one at every step."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._schedule = schedule
        self._rank = rank
        self._made: dict[tuple[int, bool], Sequence[Step]] = {}

    def of(self, num_microbatches: int, *, training: bool) -> Sequence[Step]:
        """Return the rank's program; without `training` its forwards alone."""
        key = (num_microbatches, training)
        if key not in self._made:
            schedule = self._schedule
            order = make_schedule(
                schedule.name, schedule.num_stages, num_microbatches, schedule.num_ranks
            ).order
            if not training:
                order = [[action for action in row if action.kind is Kind.F] for row in order]
            self._made[key] = lower(order, schedule.num_stages)[self._rank]
        return self._made[key]
