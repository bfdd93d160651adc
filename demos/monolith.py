"""Step 1 of the course: one process, one loop. Every pipeline has to reproduce it bit for bit.

    python demos/monolith.py

ends with

    test accuracy   0.9722
    parameters      sha256 …

The net has 16 layers of Linear(128) + ReLU and a head; it learns to name handwritten digits of 8×8
pixels. Each batch of 64 rows is cut into 8 microbatches of 8 rows, as a pipeline needs it: the
gradients of the microbatches add up to the gradient of the batch. One process gains nothing from
that. It is done here so that the pipelines of the next steps can be compared with this loop: the
`sha256` over all parameters is the same in all of them.

You can now say: the gradients of the microbatches, each weighted by its share of the rows, add up
to the gradient of the whole batch.
"""

import hashlib
import time
from itertools import pairwise

import barepp
import digits
import training

import torch
from torch import Tensor, nn
from torch.nn import functional


def build(num_layers: int, hidden: int, seed: int) -> nn.Sequential:
    """Build the net; each layer's weights come from a seed of its own."""
    model = nn.Sequential()
    for index, builder in enumerate(barepp.mlp(num_layers, hidden)):
        # Why not one seed for all? A rank of a pipeline builds only some of the layers; their
        # weights must not depend on what was drawn for the layers before them.
        torch.manual_seed(barepp.derive_seed(seed, "init", index))
        model.append(builder())
    return model


def step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_microbatches: int,
    recorder: barepp.Recorder | None = None,
) -> Tensor:
    """Add the gradients of one batch to `.grad`; return the mean loss over its rows."""
    num_microbatches = min(num_microbatches, len(labels))  # none is empty
    clock = [time.perf_counter_ns()]
    total = torch.zeros(())
    parts = zip(
        images.tensor_split(num_microbatches),  # as even as possible: [8, 64] each
        labels.tensor_split(num_microbatches),  # [8]
        strict=True,
    )
    for x, y in parts:
        # Why the factor? cross_entropy is the mean over this microbatch's rows. Weighted by the
        # microbatch's share of the batch, the means add up to the mean over all rows.
        loss = functional.cross_entropy(model(x), y) * (len(y) / len(labels))  # []
        clock.append(time.perf_counter_ns())
        loss.backward()
        clock.append(time.perf_counter_ns())
        total += loss.detach()
    if recorder is not None:
        record(recorder, num_microbatches, clock)
    return total


def optimizers(
    model: nn.Module, flags: training.Flags
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimizer, and what lets its learning rate decay."""
    optimizer = torch.optim.Adam(model.parameters(), lr=flags.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / flags.steps)
    return optimizer, decay


def train(world: barepp.World, flags: training.Flags) -> training.Results:
    """Train the net on the digits in this process."""
    if world.world_size > 1:
        raise barepp.UsageError("this demo is one process by itself: python demos/monolith.py")
    if world.device.type != "cpu":
        raise barepp.UsageError(f"this demo computes on the CPU, not on {world.device}")
    training_set, test_set = digits.load()
    model = build(flags.layers, flags.hidden, flags.seed)
    optimizer, decay = optimizers(model, flags)
    recorder = barepp.Recorder(tracing=flags.trace is not None, schedule=schedule(flags))
    progress = training.Progress(flags.steps)
    for index in range(flags.steps):
        images, labels = digits.batch(training_set, index, flags.batch, flags.seed)
        optimizer.zero_grad()
        recorder.begin_step(index)
        loss = step(model, images, labels, flags.microbatches, recorder)  # []
        recorder.end_step()
        with recorder.span("optimizer"):
            optimizer.step()
        decay.step()
        progress.after_step(loss, len(labels))
    with torch.no_grad():
        answers = model(test_set.images).argmax(1)  # [360]
    return training.results_of(
        world,
        flags,
        recorder,
        1,  # microbatch in flight
        schedule="monolith",
        stages=1,
        partition=[flags.layers + 1],
        losses=progress.losses,
        test_accuracy=(answers == test_set.labels).double().mean().item(),
        parameters_sha256=parameters_sha256(model),
        same_bits=True,  # this is the one process
        bubble_predicted=0.0,
        bubble_measured=0.0,  # one process waits for no other
    )


def parameters_after(num_steps: int, flags: training.Flags) -> str:
    """Return the SHA-256 of the parameters after the first steps: the other demos compare it."""
    training_set, _ = digits.load()
    model = build(flags.layers, flags.hidden, flags.seed)
    optimizer, decay = optimizers(model, flags)
    for index in range(num_steps):
        optimizer.zero_grad()
        step(model, *digits.batch(training_set, index, flags.batch, flags.seed), flags.microbatches)
        optimizer.step()
        decay.step()
    return parameters_sha256(model)


def parameters_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters: float32, little-endian, in layer order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(bytes(parameter.detach().flatten().view(torch.uint8).tolist()))
    return digest.hexdigest()


def schedule(flags: training.Flags) -> barepp.Schedule:
    """Return the order of `step` as a schedule: the naive one of a pipeline of one stage."""
    return barepp.make_schedule("naive", 1, flags.microbatches)


def record(recorder: barepp.Recorder, num_microbatches: int, clock: list[int]) -> None:
    """Tell the recorder when the forwards and backwards of a step began and ended, for --trace."""
    [actions] = barepp.make_schedule("naive", 1, num_microbatches).order
    program = [(action, None, None) for action in actions]  # received from no rank, sent to none
    times = [(a, a, b, b) for a, b in pairwise(clock)]
    recorder.add_actions(program, times)


def report(results: training.Results) -> str:
    """Return the lines that a person reads at the end."""
    return (
        f"\ntest accuracy   {results['test_accuracy']:.4f}"
        f"\nparameters      sha256 {results['parameters_sha256']}"
        "\nlook next       demos/manual_split.py: the same net in two halves"
    )


if __name__ == "__main__":
    without = ("stages", "partition", "recompute", "autocast")
    training.main(train, __doc__, without=without, report=report)
