"""Step 10 of the course: zero bubble (ZB-H1). A backward in two parts, one of which can wait.

    python -m barepp.launch --world 4 demos/zero_bubble.py

ends with

    rank   peak in-flight …
       0                4 …
       1                4 …
       2                4 …
       3                4 …
    bubble          11.1% predicted, …
    test accuracy   0.9778

A backward computes two things: the gradient of the stage's input (I), for which the rank before is
waiting, and those of its weights (W), for which nobody waits until the optimizer runs. So do I at
once, and W when there is nothing better to do: the bubble at the end fills up. Four ranks, as
`python -m barepp.plan --schedule zb_h1 --stages 4 --microbatches 4` draws them:

    tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14
    rank 0  F0 F1 F2 F3 .  .  .  I0 W0 I1 W1 I2 W2 I3 W3
    rank 1  .  F0 F1 F2 .  .  I0 F3 I1 W0 I2 W1 I3 W2 W3
    rank 2  .  .  F0 F1 .  I0 F2 I1 F3 I2 W0 I3 W1 W2 W3
    rank 3  .  .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3

All end together, where with 1F1B the last rank has nothing to do while the others drain. The
weights' gradients still add up in the order of the microbatches: the bits are the same as ever.

The gain shows where a layer's work outweighs the call into autograd that I takes for each layer,
some 30 µs. The layers of this net do not: barepp/README.md has the figures.

Qi et al. (2023), "Zero Bubble Pipeline Parallelism", section 2.2; what they call B is our I. The
order itself is barepp/schedules/zb_h1.py; how a backward comes apart,
barepp/train/stage/backward.py.
"""

from functools import partial

import training

if __name__ == "__main__":
    training.main(partial(training.train, schedule="zb_h1"), __doc__)
