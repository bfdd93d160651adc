"""Step 1 of the course: one process, one loop. What every pipeline has to reproduce bit for bit.

    python demos/monolith.py

ends with

    test accuracy   0.9778

The net is 16 layers of Linear(128) + ReLU and a head; it learns to name handwritten digits of 8×8
pixels. Each batch of 64 rows is cut into 8 microbatches of 8, as a pipeline will need it: the
gradients of the microbatches add up to those of the batch. One process gains nothing by that. It
is done here so that the pipelines of the next steps can be compared with it: `parameters_sha256`
is the same in all of them.
"""

import dataclasses
import functools
import hashlib
import time

import barepp
import digits
import training
from barepp.program.lowering import Step, lower
from barepp.trace.recorder import Recorder, Times
from barepp.train.stage.seeding import derive_seed

import torch
from torch import nn
from torch.nn import functional


def build(num_layers: int, hidden: int, seed: int) -> nn.Sequential:
    """Build the net; each layer's weights come from a seed of its own."""
    model = nn.Sequential()
    for index, builder in enumerate(barepp.mlp(num_layers, hidden)):
        # Why not one seed for all? A rank of a pipeline builds only some of the layers; their
        # weights must not depend on what was drawn for the layers before them.
        torch.manual_seed(derive_seed(seed, "init", index))
        model.append(builder())
    return model


def step(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    num_microbatches: int,
    recorder: Recorder | None = None,
) -> torch.Tensor:
    """Add the gradients of one batch to `.grad`; return the mean loss over its rows."""
    num_microbatches = min(num_microbatches, len(labels))  # none is empty
    times: list[Times] = []
    total = torch.zeros(())
    parts = zip(
        images.tensor_split(num_microbatches),  # as even as possible: [8, 64] each
        labels.tensor_split(num_microbatches),  # [8]
        strict=True,
    )
    for x, y in parts:
        began = time.perf_counter_ns()
        # Why the factor? cross_entropy is the mean over this microbatch's rows. Weighted by the
        # microbatch's share of the batch, the means add up to that over all rows.
        loss = functional.cross_entropy(model(x), y) * (len(y) / len(labels))  # []
        forward_ended = time.perf_counter_ns()
        loss.backward()
        ended = time.perf_counter_ns()
        times.append((began, began, forward_ended, forward_ended))
        times.append((forward_ended, forward_ended, ended, ended))
        total += loss.detach()
    if recorder is not None:
        recorder.add_actions(program(num_microbatches), times)
    return total


def schedule(num_microbatches: int) -> barepp.Schedule:
    """Return what `step` does as a schedule: the naive one of a pipeline of one stage."""
    naive = barepp.make_schedule("naive", 1, num_microbatches)
    return dataclasses.replace(naive, name="monolith")


@functools.cache
def program(num_microbatches: int) -> list[Step]:
    """Return the schedule's actions, none of which sends anything."""
    [alone] = lower(schedule(num_microbatches).order, num_stages=1)
    return alone


def train(world: barepp.World, flags: training.Flags) -> training.Results:
    """Train the net on the digits in this process."""
    if world.world_size > 1:
        raise barepp.UsageError("this demo is one process by itself: python demos/monolith.py")
    if world.device.type != "cpu":
        raise barepp.UsageError(f"this demo computes on the CPU, not on {world.device}")
    training_set, test_set = digits.load()
    model = build(flags.layers, flags.hidden, flags.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=flags.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / flags.steps)
    progress = training.Progress(flags.steps)
    recorder = Recorder(tracing=flags.trace is not None, schedule=schedule(flags.microbatches))
    losses = []
    for index in range(flags.steps):
        images, labels = digits.batch(training_set, index, flags.batch, flags.seed)
        optimizer.zero_grad()
        recorder.begin_step(index)
        losses.append(step(model, images, labels, flags.microbatches, recorder).item())
        recorder.end_step()
        with recorder.span("optimizer"):
            optimizer.step()
        decay.step()
        progress.tell(index, losses[-1], len(labels))
    summary = barepp.summarise(world, recorder, peak_in_flight=1)
    if flags.trace is not None:
        barepp.write_trace(world, recorder, flags.trace)
    with torch.no_grad():
        answers = model(test_set.images).argmax(1)  # [360]
    return training.Results(
        schedule="monolith",
        world_size=1,
        stages=1,
        partition=[flags.layers + 1],
        microbatches=flags.microbatches,
        steps=flags.steps,
        losses=losses,
        test_accuracy=(answers == test_set.labels).double().mean().item(),
        parameters_sha256=parameters_sha256(model),
        step_ms=summary.step_ms,
        # One process waits for nobody, and keeps one microbatch at a time.
        bubble_measured=0.0,
        bubble_predicted=0.0,
        peak_in_flight=[1],
        computing_ms=summary.computing_ms,
        waiting_ms=summary.waiting_ms,
        moving_ms=summary.moving_ms,
        ranks=summary.ranks,
    )


def parameters_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters: float32, little-endian, in layer order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(bytes(parameter.detach().flatten().view(torch.uint8).tolist()))
    return digest.hexdigest()


if __name__ == "__main__":
    training.main(train, __doc__, without=("stages", "partition", "recompute", "autocast"))
