"""Step 5 of the course: a pipeline of four processes in which one works and three wait.

    python -m barepp.launch --world 4 demos/naive.py

ends with

    bubble          75.0% predicted, …
    test accuracy   0.9778

Each microbatch goes forward through all stages and all the way back before the next one starts.
So on p ranks the bubble is (p - 1) / p, however many microbatches there are. Two of them, as
`python -m barepp.plan --schedule naive --stages 4 --microbatches 2` draws them:

    tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17 18 19 20 21 22 23
    rank 0  F0 .  .  .  .  .  .  .  .  .  B0--- F1 .  .  .  .  .  .  .  .  .  B1---
    rank 1  .  F0 .  .  .  .  .  .  B0--- .  .  .  F1 .  .  .  .  .  .  B1--- .  .
    rank 2  .  .  F0 .  .  .  B0--- .  .  .  .  .  .  F1 .  .  .  B1--- .  .  .  .
    rank 3  .  .  .  F0 B0--- .  .  .  .  .  .  .  .  .  F1 B1--- .  .  .  .  .  .

The order itself is barepp/schedules/naive.py; the training loop is demos/training.py.
"""

from functools import partial

import training

if __name__ == "__main__":
    training.main(partial(training.train, schedule="naive"), __doc__)
