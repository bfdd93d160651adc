"""The interleaved 1F1B schedule: v thin stages a rank instead of a thick one, 1/v of the bubble.

Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", arXiv 2104.04473 §2.2. Stage s lives on rank s mod p, so a microbatch goes round the
ranks v times and the pipeline is full after p thin forwards instead of p thick ones. The price:
v times as many messages, and a little more memory. The paper wants m to be a multiple of p; here
any m will do, see `interleaved_1f1b_order`.
"""

from collections.abc import Iterator

from barepp.program.actions import Action, Kind
from barepp.schedules.layout import require_equal_share


def interleaved_1f1b_order(
    num_stages: int, num_microbatches: int, num_ranks: int
) -> Iterator[list[Action]]:
    """Yield each rank's list; for 4 stages on 2 ranks and 2 microbatches (a B takes two ticks):

        tick    0   1   2   3   4   5   6   7   8   9   10  11  12  13  14
        rank 0  0F0 0F1 2F0 2F1 .   .   2B0---- .   2B1---- 0B0---- 0B1----
        rank 1  .   1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1---- .   .

    Rank r keeps at most (v-1)p + 2(p-1-r) + 1 activations, each 1/v the size of a 1F1B stage's.

    Where p does not divide m, this is the order for the next multiple of p with the microbatches
    that do not exist left out. Closing the gaps would save nothing and may never end: forwards and
    backwards that belong side by side would slide apart, until two ranks wait for each other.
    """
    stages_per_rank = require_equal_share("interleaved_1f1b", num_stages, num_ranks)
    for rank in range(num_ranks):
        held = range(rank, num_stages, num_ranks)
        forwards = _in_groups(Kind.F, held, num_microbatches, num_ranks)
        backwards = _in_groups(Kind.B, held[::-1], num_microbatches, num_ranks)
        # The first microbatch comes to the last stage after v-1 rounds of p forwards each, and its
        # gradient back to this rank after twice the ranks behind it: down to the last one and up.
        warmup = (stages_per_rank - 1) * num_ranks + 2 * (num_ranks - 1 - rank)
        actions = forwards[:warmup]
        for backward, forward in enumerate(range(warmup, len(forwards))):  # steady
            actions += [forwards[forward], backwards[backward]]
        actions += backwards[max(0, len(forwards) - warmup) :]  # cooldown
        yield [action for action in actions if action.microbatch < num_microbatches]


def _in_groups(kind: Kind, stages: range, num_microbatches: int, num_ranks: int) -> list[Action]:
    """Return one list of all: p microbatches through the first stage, the same p through the next.

    With p = 2, stages 0 and 2:  0F0 0F1  2F0 2F1    0F2 0F3  2F2 2F3    …

    Groups of p, because that is when the first of them has gone round all ranks and is here again.
    """
    size = min(num_ranks, num_microbatches)
    return [
        Action(stage, kind, microbatch)
        for first in range(0, num_microbatches, size)
        for stage in stages
        for microbatch in range(first, first + size)  # the last group may go beyond the end
    ]
