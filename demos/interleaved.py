"""Step 11 of the course: interleaved 1F1B. Thinner stages, several a rank: less time to fill.

    python -m barepp.launch --world 4 demos/interleaved.py

ends with

    test accuracy   0.9722
    parameters      sha256 …
    the same bits as one process: yes …
    bubble          15.8% predicted, …
    …
    in flight       at most 11, 9, 7, 5 microbatches …

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

You can now say: with v thinner stages on each rank the pipeline fills v times as fast; the price
is v times as many messages.
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
        schedule="interleaved_1f1b",
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
