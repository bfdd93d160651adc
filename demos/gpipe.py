"""Step 6 of the course: GPipe. All microbatches go forward, one behind the other, then all back.

    python -m barepp.launch --world 4 demos/gpipe.py

ends with

    bubble          27.3% predicted, …
    test accuracy   0.9778

While stage 1 works on the first microbatch, stage 0 is at the second already. What remains idle is
the filling and the draining: with p ranks and m microbatches a bubble of (p - 1) / (m + p - 1), the
smaller the more microbatches. Their price is memory: each rank keeps all m until they come back.
Four of them, as `python -m barepp.plan --schedule gpipe --stages 4 --microbatches 4` draws them:

    tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17 18 19 20
    rank 0  F0 F1 F2 F3 .  .  .  .  .  .  .  .  .  B0--- B1--- B2--- B3---
    rank 1  .  F0 F1 F2 F3 .  .  .  .  .  .  B0--- B1--- B2--- B3--- .  .
    rank 2  .  .  F0 F1 F2 F3 .  .  .  B0--- B1--- B2--- B3--- .  .  .  .
    rank 3  .  .  .  F0 F1 F2 F3 B0--- B1--- B2--- B3--- .  .  .  .  .  .

Huang et al. (2019), "GPipe: Efficient Training of Giant Neural Networks using Pipeline
Parallelism". The order itself is barepp/schedules/gpipe.py; the training loop demos/training.py.
"""

from functools import partial

import training

if __name__ == "__main__":
    training.main(partial(training.train, schedule="gpipe"), __doc__)
