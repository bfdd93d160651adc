"""Step 11 of the course: ZB-V. Down the ranks and up again, and hardly a bubble is left.

    python -m barepp.launch --world 4 demos/zero_bubble_v.py

ends with

    rank   peak in-flight …
       0                8 …
       1                8 …
       2                8 …
       3                8 …
    bubble          5.9% predicted, …
    test accuracy   0.9778

Two stages a rank, but not dealt out like cards: rank r has stage r on the way down and stage
2p - 1 - r on the way up. The rank with the first stage has the last one too, so a gradient starts
where work to fill in is at hand. Together with I and W there is a bubble at the start alone. All
ranks keep the same: 2p half stages, the memory of 1F1B's first rank. Two ranks, as
`python -m barepp.plan --schedule zb_v --stages 4 --microbatches 3` draws them:

    tick    0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18
    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .
    rank 1  .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

Qi et al. (2024), "Pipeline Parallelism with Controllable Memory", section 3. The order itself is
barepp/schedules/zb_v.py.
"""

from functools import partial

import training

if __name__ == "__main__":
    training.main(partial(training.train, schedule="zb_v"), __doc__)
