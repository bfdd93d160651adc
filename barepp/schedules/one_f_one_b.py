"""The 1F1B schedule: after a short warmup every rank alternates one forward and one backward.

Narayanan et al. 2019, "PipeDream" (SOSP), §3.2, in the form with a flush at the end of each step:
Narayanan et al. 2021, arXiv 2104.04473 §2.2.1. With equal stages it takes as long as GPipe;
the gain is memory, since rank r keeps min(m, p - r) activations instead of m.
"""

from collections.abc import Iterator

from barepp.program.actions import Action, Kind
from barepp.schedules.layout import require_one_stage_per_rank


def one_f_one_b_order(
    num_stages: int, num_microbatches: int, num_ranks: int
) -> Iterator[list[Action]]:
    """Yield each rank's list; for 3 stages and 4 microbatches (a B takes two ticks, a dot is idle):

        tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17
        rank 0  F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
        rank 1  .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
        rank 2  .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .

    Rank r holds at most p - r microbatches: the B that frees one comes before the next F.
    """
    require_one_stage_per_rank("1f1b", num_stages, num_ranks)
    for stage in range(num_stages):
        # Warmup: as many forwards as there are stages behind this one, so that the first gradient
        # is on its way back when they are done. Fewer microbatches than that: all of them.
        warmup = min(num_stages - 1 - stage, num_microbatches)
        actions = [Action(stage, Kind.F, microbatch) for microbatch in range(warmup)]
        for microbatch in range(warmup, num_microbatches):  # steady: one F, then the oldest B
            actions.append(Action(stage, Kind.F, microbatch))
            actions.append(Action(stage, Kind.B, microbatch - warmup))
        for microbatch in range(num_microbatches - warmup, num_microbatches):  # cooldown
            actions.append(Action(stage, Kind.B, microbatch))
        yield actions
