"""The ZB-V schedule: the stages go down the ranks and up again, and hardly a bubble is left.

Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", arXiv 2405.15362 §3, the V-shaped
schedule with 1F1B's memory. Rank r holds stage r on the way down and stage 2p-1-r on the way up, so
the rank with the first stage has the last one too: the loss is computed where the inputs come in,
and the gradients need not first travel back to where there is work to fill in. With equal costs of
1/2 for each stage the makespan is 3m + (p-1)/2, of which (p-1)/2 is unavoidable: the last rank has
nothing before that. (With few microbatches, below (3p-1)/2, it is ZB-H1's 2m + 2p - 1.)
"""

from collections import defaultdict
from collections.abc import Iterator

from barepp.program.actions import Action, Kind
from barepp.schedules.layout import require_two_stages_per_rank


def zb_v_order(num_stages: int, num_microbatches: int, num_ranks: int) -> Iterator[list[Action]]:
    """Yield each rank's list; for 4 stages on 2 ranks and 3 microbatches:

        tick    0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18
        rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .
        rank 1  .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

    Every rank keeps at most 2p activations of half a 1F1B stage's size: the memory of p whole ones.

    The phases below need 2p-1 microbatches to exist. With fewer it is the same order with those
    that do not exist left out.
    """
    require_two_stages_per_rank("zb_v", num_stages, num_ranks)
    for rank in range(num_ranks):
        actions = _one_rank(rank, num_ranks, max(num_microbatches, 2 * num_ranks - 1))
        yield [action for action in actions if action.microbatch < num_microbatches]


def _one_rank(r: int, p: int, m: int) -> Iterator[Action]:
    """Write the phases out; m is at least 2p-1."""
    stage = {"v": r, "^": 2 * p - 1 - r}  # Fv is a forward on the way down, F^ on the way up
    phases = [
        (2 * (p - 1 - r) + 1, "Fv"),  # until the first microbatch is back: p-1-r ranks down and up
        (r, "F^ Fv"),  # until its gradient is: r ranks to the last stage and back
        (p - r, "F^ I^ W^"),  # the same on the other leg: p-1-r ranks down and up
        (m - 2 * p + 1 + r, "Fv Iv Wv F^ I^ W^"),  # steady
        (p - 1 - r, "Iv Wv F^ I^ W^"),  # the way down has no forwards left
        (r, "Iv I^"),  # nor has the way up; ranks are waiting for the input gradients
        (p - r, "Iv Wv"),
        (r, "W^"),
        (r, "Wv"),
    ]
    done: dict[str, int] = defaultdict(int)  # how many of each word
    for repeats, pattern in phases:
        for word in pattern.split() * repeats:
            yield Action(stage[word[1]], Kind(word[0]), done[word])
            done[word] += 1
