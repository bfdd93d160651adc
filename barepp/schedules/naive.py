"""The naive schedule: one microbatch at a time goes through all stages and back; one rank works.

Huang et al. 2019, "GPipe", arXiv 1811.06965, figure 2(b): model parallelism without a pipeline.
"""

from collections.abc import Iterator

from barepp.program.actions import Action, Kind
from barepp.schedules.layout import require_one_stage_per_rank


def naive_order(num_stages: int, num_microbatches: int, num_ranks: int) -> Iterator[list[Action]]:
    """Yield each rank's list; for 3 stages and 2 microbatches (a B takes two ticks, a dot is idle):

        tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17
        rank 0  F0 .  .  .  .  .  .  B0--- F1 .  .  .  .  .  .  B1---
        rank 1  .  F0 .  .  .  B0--- .  .  .  F1 .  .  .  B1--- .  .
        rank 2  .  .  F0 B0--- .  .  .  .  .  .  F1 B1--- .  .  .  .

    Nothing here says that rank 1 waits for rank 0: that follows from what 1F0 needs.
    """
    require_one_stage_per_rank("naive", num_stages, num_ranks)
    for stage in range(num_stages):
        yield [
            Action(stage, kind, microbatch)
            for microbatch in range(num_microbatches)
            for kind in (Kind.F, Kind.B)
        ]
