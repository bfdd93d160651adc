"""Step 7 of the course: 1F1B. As soon as a microbatch can go back it does: the memory of few.

    python -m barepp.launch --world 4 demos/one_f_one_b.py

ends with

    rank   peak in-flight …
       0                4 …
       1                3 …
       2                2 …
       3                1 …
    bubble          27.3% predicted, …
    test accuracy   0.9778

The bubble is GPipe's, (p - 1) / (m + p - 1). But once the pipeline is full a rank does one forward,
one backward, in turn, and so rank r never keeps more than p - r microbatches, however many there
are. Four, as `python -m barepp.plan --schedule 1f1b --stages 4 --microbatches 4` draws them:

    tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17 18 19 20
    rank 0  F0 F1 F2 F3 .  .  .  .  .  .  B0--- .  B1--- .  B2--- .  B3---
    rank 1  .  F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3--- .  .
    rank 2  .  .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .  .  .
    rank 3  .  .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .  .  .

Narayanan et al. (2019), "PipeDream: Generalized Pipeline Parallelism for DNN Training", section
3.2; with the flush at each step's end it is their "PipeDream-Flush" of 2021. The order itself is
barepp/schedules/one_f_one_b.py; the training loop demos/training.py.
"""

from functools import partial

import training

if __name__ == "__main__":
    training.main(partial(training.train, schedule="1f1b"), __doc__)
