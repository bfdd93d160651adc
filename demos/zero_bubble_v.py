"""Step 13 of the course: ZB-V. Down the ranks and up again, and hardly a bubble is left.

    python -m barepp.launch --world 4 demos/zero_bubble_v.py

ends with

    test accuracy   0.9722
    parameters      sha256 …
    the same bits as one process: yes …
    bubble          5.9% predicted, …
    …
    in flight       at most 8, 8, 8, 8 microbatches …

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

You can now say: when one rank has the first and the last stage, and backwards are split, only the
start has a bubble.
"""

import barepp
import digits
import training
from follower import Follower

import torch
from torch.nn import functional


def train(world: barepp.World, flags: training.Flags) -> training.Results:
    """Train the net on the digits; every rank runs this, and returns the same results."""
    training_set, test_set = digits.load()
    pipe = barepp.Pipeline(
        world,
        barepp.mlp(flags.layers, flags.hidden),  # each rank builds its own layers only
        functional.cross_entropy,
        schedule="zb_v",
        num_microbatches=flags.microbatches,
        seed=flags.seed,
        sample=digits.batch(training_set, 0, flags.batch, flags.seed),  # for --partition balanced
        **training.pipeline_options(flags),  # --stages, --partition, --recompute, --autocast
    )
    # Each rank has an optimizer for its own layers: Adam treats each number by itself, so the
    # ranks need not agree on anything.
    optimizer = torch.optim.Adam(pipe.parameters(), lr=flags.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / flags.steps)
    scaler = barepp.LossScaler(pipe, enabled=flags.autocast == "fp16")  # for --autocast fp16 only
    follower = Follower(world, pipe, flags)
    for step in range(flags.steps):
        images, labels = digits.batch(training_set, step, flags.batch, flags.seed)
        pipe.zero_grad()
        loss = pipe.step(images, labels)  # [], the mean of the batch, on every rank
        if scaler.step(optimizer):  # optimizer.step(); float16 sometimes has to skip it
            decay.step()
        follower.after_step(loss, len(labels))
    pipe.eval()
    answers = pipe.forward(test_set.images)  # [360, 10] on the rank of the last stage, else None
    right = None if answers is None else (answers.argmax(1).cpu() == test_set.labels).double()
    shares = world.broadcast(right, root=pipe.last_rank)  # [360] of 0 and 1, on every rank
    return follower.results(test_accuracy=shares.mean().item())


if __name__ == "__main__":
    training.main(train, __doc__)
