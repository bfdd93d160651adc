"""Step 8 of the course: GPipe. All microbatches go forward, one behind the other, then all back.

    python -m barepp.launch --world 4 demos/gpipe.py

ends with

    test accuracy   0.9722
    parameters      sha256 …
    the same bits as one process: yes …
    bubble          27.3% predicted, …
    …
    in flight       at most 8, 8, 8, 8 microbatches …

While stage 1 works on the first microbatch, stage 0 already works on the second. Ranks are idle
only while the pipeline fills and drains: with p ranks and m microbatches the bubble is
(p - 1) / (m + p - 1), so more microbatches make it smaller. Their price is memory: each rank keeps
the activations of all m until the gradients come back.
Four of them, as `python -m barepp.plan --schedule gpipe --stages 4 --microbatches 4` draws them:

    tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17 18 19 20
    rank 0  F0 F1 F2 F3 .  .  .  .  .  .  .  .  .  B0--- B1--- B2--- B3---
    rank 1  .  F0 F1 F2 F3 .  .  .  .  .  .  B0--- B1--- B2--- B3--- .  .
    rank 2  .  .  F0 F1 F2 F3 .  .  .  B0--- B1--- B2--- B3--- .  .  .  .
    rank 3  .  .  .  F0 F1 F2 F3 B0--- B1--- B2--- B3--- .  .  .  .  .  .

Huang et al. (2019), "GPipe: Efficient Training of Giant Neural Networks using Pipeline
Parallelism". The order itself is barepp/schedules/gpipe.py.

You can now say: GPipe fills the pipeline with all m microbatches: the bubble shrinks to (p - 1) /
(m + p - 1), but each rank keeps the activations of all m.
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
        schedule="gpipe",
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
