"""The GPipe schedule: all forwards (fill the pipeline), then all backwards (drain it).

Huang et al. 2019, "GPipe", arXiv 1811.06965 §2, figure 2(c); its bubble is (p-1)/(m+p-1) for p
stages and m microbatches. The figure runs the backwards from the last microbatch to the first;
here they run from the first, which takes the same time and adds gradients in microbatch order.
"""

from collections.abc import Iterator

from barepp.program.actions import Action, Kind
from barepp.schedules.layout import require_one_stage_per_rank


def gpipe_order(num_stages: int, num_microbatches: int, num_ranks: int) -> Iterator[list[Action]]:
    """Yield each rank's list; for 3 stages and 3 microbatches (a B takes two ticks, a dot is idle):

        tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14
        rank 0  F0 F1 F2 .  .  .  .  .  .  B0--- B1--- B2---
        rank 1  .  F0 F1 F2 .  .  .  B0--- B1--- B2--- .  .
        rank 2  .  .  F0 F1 F2 B0--- B1--- B2--- .  .  .  .

    Every rank keeps all m activations until the first backward reaches it.
    """
    require_one_stage_per_rank("gpipe", num_stages, num_ranks)
    for stage in range(num_stages):
        yield [
            Action(stage, kind, microbatch)
            for kind in (Kind.F, Kind.B)
            for microbatch in range(num_microbatches)
        ]
