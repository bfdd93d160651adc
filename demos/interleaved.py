"""Step 9 of the course: interleaved 1F1B. Thinner stages, several a rank: less time to fill.

    python -m barepp.launch --world 4 demos/interleaved.py

ends with

    rank   peak in-flight …
       0               11 …
       1                9 …
       2                7 …
       3                5 …
    bubble          15.8% predicted, …
    test accuracy   0.9778

With 1F1B the last rank waits until a microbatch has been through p - 1 whole stages. Cut the model
into twice as many stages and deal them out like cards, stage s to rank s mod p: a microbatch goes
round the ranks twice, and the last rank starts after p - 1 half stages. With v stages a rank the
bubble's time is 1/v of 1F1B's. The prices: v times as many messages, and somewhat more memory (the
eleven above are of half a stage each). Two ranks with two stages each, drawn by
`python -m barepp.plan --schedule interleaved_1f1b --stages 4 --ranks 2 --microbatches 2`:

    tick    0   1   2   3   4   5   6   7   8   9   10  11  12  13  14
    rank 0  0F0 0F1 2F0 2F1 .   .   2B0---- .   2B1---- 0B0---- 0B1----
    rank 1  .   1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1---- .   .

`--stages 12` makes it three a rank. (1F1B's bubble is 27.3%: demos/one_f_one_b.py.)

Narayanan et al. (2021), "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", section 2.2. The order itself is barepp/schedules/interleaved_1f1b.py.
"""

from functools import partial

import training

if __name__ == "__main__":
    training.main(partial(training.train, schedule="interleaved_1f1b"), __doc__)
