"""Step 7 of the course: a pipeline of four processes in which one works and three wait.

    python -m barepp.launch --world 4 demos/naive.py

ends with

    test accuracy   0.9722
    parameters      sha256 …
    the same bits as one process: yes …
    bubble          75.0% predicted, …
    …
    in flight       at most 1, 1, 1, 1 microbatches …

Each microbatch goes forward through all stages and all the way back before the next one starts.
So on p ranks the bubble is (p - 1) / p, however many microbatches there are. Two of them, as
`python -m barepp.plan --schedule naive --stages 4 --microbatches 2` draws them:

    tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17 18 19 20 21 22 23
    rank 0  F0 .  .  .  .  .  .  .  .  .  B0--- F1 .  .  .  .  .  .  .  .  .  B1---
    rank 1  .  F0 .  .  .  .  .  .  B0--- .  .  .  F1 .  .  .  .  .  .  B1--- .  .
    rank 2  .  .  F0 .  .  .  B0--- .  .  .  .  .  .  F1 .  .  .  B1--- .  .  .  .
    rank 3  .  .  .  F0 B0--- .  .  .  .  .  .  .  .  .  F1 B1--- .  .  .  .  .  .

The order itself is barepp/schedules/naive.py.

You can now say: with one microbatch at a time, one rank works and the other p - 1 wait: the bubble
is (p - 1) / p.
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
        schedule="naive",
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
