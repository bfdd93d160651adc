"""Step 12 of the course: zero bubble (ZB-H1). A backward in two parts, one of which can wait.

    python -m barepp.launch --world 4 demos/zero_bubble.py

ends with

    test accuracy   0.9722
    parameters      sha256 …
    the same bits as one process: yes …
    bubble          11.1% predicted, …
    …
    in flight       at most 4, 4, 4, 4 microbatches …

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

You can now say: a backward has two parts: another rank waits for the input gradient only, so the
weight gradient can fill the bubble.
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
        schedule="zb_h1",
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
