"""The ZB-H1 schedule: 1F1B whose weight gradients wait until there is nothing better to do.

Qi et al. 2023, "Zero Bubble Pipeline Parallelism", arXiv 2401.10241 §2.2, figure 3 (their B is our
I). The stage before waits only for the input gradient I; W fills what was a bubble. With equal
costs and m >= p the makespan is 3m + p - 1 instead of 1F1B's 3m + 3(p - 1); every rank keeps
min(m, p) microbatches, as many as the first rank of 1F1B.
"""

from collections.abc import Iterator

from barepp.program.actions import Action, Kind
from barepp.schedules.layout import require_one_stage_per_rank


def zb_h1_order(num_stages: int, num_microbatches: int, num_ranks: int) -> Iterator[list[Action]]:
    """Yield each rank's list; for 3 stages and 4 microbatches:

        tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13
        rank 0  F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        rank 1  .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        rank 2  .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    1F1B leaves rank r room for r more microbatches than it needs. They are kept for later: the W of
    the last r microbatches fill the rank's time while the ranks before it are still draining.
    """
    require_one_stage_per_rank("zb_h1", num_stages, num_ranks)
    for stage in range(num_stages):
        ahead = num_stages - 1 - stage  # forwards before the first I, as in 1F1B
        behind = stage  # input gradients before the first W
        actions: list[Action] = []
        # Warmup and cooldown are the turns in which one of the three has no microbatch.
        for turn in range(-ahead, num_microbatches + behind):
            if turn + ahead < num_microbatches:
                actions.append(Action(stage, Kind.F, turn + ahead))
            if 0 <= turn < num_microbatches:
                actions.append(Action(stage, Kind.I, turn))
            if turn >= behind:
                actions.append(Action(stage, Kind.W, turn - behind))
        yield actions
