"""Step 15 of the course: one layer is heavier than the others. Where to cut?

    python -m barepp.launch --world 2 demos/balance.py

ends with

    partition   layers      predicted: step, bubble    measured: step, bubble
    uniform     9,8 …
    balanced    …
    the balanced step takes 0.87 of the uniform one's time (0.82 predicted)
    both have learnt the same, bit for bit: sha256 …

The net is that of the other steps, but wider, and its third layer is a block of four times that
width: it has as much work as eight of the others. Stages with equally many layers then have unequal
work, and all ranks wait for the slowest stage, in every microbatch.

So the demo measures the layers, one after the other, each as a stage of its own
(barepp/train/layer_profiler.py). Then it cuts where the slowest stage is as fast as it can be
(barepp/plan/balance.py). The simulator predicts the gain before anything is trained. In a script of
your own all this is

    barepp.Pipeline(…, partition="balanced", sample=(inputs, targets))

Here both partitions are trained, in turns; `--trace PATH` records the balanced one. The prediction
assumes a core for each rank. Ranks that share cores with each other, or with other programs, gain
little: the same work shares the same cores, wherever the model is cut.

You can now say: a pipeline is as fast as its slowest stage: measure the layers, and cut where the
slowest stage is fastest.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from functools import partial

import barepp
import digits
import training
from flags import check_at_least, run_demo

import torch
from torch import Tensor, nn
from torch.nn import functional

DEFAULTS = training.Flags(steps=60, batch=256, hidden=256)
HEAVY = 2  # which layer
TIMES = 4  # how much wider it is within
SCHEDULE = "1f1b"
TURN = 10  # steps
# Flags of the other steps that are settled here.
WITHOUT = ("stages", "partition", "recompute", "autocast", "verbose")


class Block(nn.Module):
    """A layer that is wide within."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widen, narrow = barepp.mlp(1, TIMES * width, in_features=width, num_classes=width)
        self.widen, self.narrow = widen(), narrow()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.narrow(self.widen(x)))  # [rows, width]


@dataclasses.dataclass(frozen=True)
class Row:
    """One partition: what it was predicted to come to, and what it came to."""

    partition: list[int]
    predicted_ms: float
    bubble_predicted: float
    step_ms: float
    bubble_measured: float
    parameters_sha256: str


def layers_of(flags: training.Flags) -> list[Callable[[], nn.Module]]:
    """Return the builders of the net."""
    layers = barepp.mlp(flags.layers, flags.hidden)
    return [*layers[:HEAVY], partial(Block, flags.hidden), *layers[HEAVY + 1 :]]


def measured(
    world: barepp.World, flags: training.Flags, data: digits.Digits
) -> list[barepp.LayerCost]:
    """Return what each layer costs, for the first microbatch of the first batch."""
    batch = digits.batch(data, 0, flags.batch, flags.seed)
    rows = math.ceil(len(batch.labels) / flags.microbatches)
    images, labels = batch.images[:rows], batch.labels[:rows]  # [rows, 64], [rows]
    return barepp.profile(
        layers_of(flags),
        functional.cross_entropy,
        images,
        labels,
        seed=flags.seed,
        device=world.device,
    )


def compare(world: barepp.World, flags: training.Flags) -> tuple[list[Row], list[barepp.LayerCost]]:
    """Train the net cut in both ways; the same rows on every rank, the costs on rank 0."""
    data, _ = digits.load()
    schedule = barepp.make_schedule(SCHEDULE, world.world_size, flags.microbatches)
    costs = measured(world, flags, data) if world.rank == 0 else []
    # Rank 0 alone has measured, so it tells the others where to cut.
    sizes = torch.tensor(barepp.balance(costs, schedule)) if world.rank == 0 else None
    told = world.broadcast(sizes, root=0)
    pipes = [
        barepp.Pipeline(
            world,
            layers_of(flags),
            functional.cross_entropy,
            schedule=SCHEDULE,
            num_microbatches=flags.microbatches,
            partition=how,
            seed=flags.seed,
        )
        for how in ("uniform", told.tolist())
    ]
    if flags.trace is not None:
        pipes[1].trace()
    train_in_turns(pipes, data, flags)
    if flags.trace is not None:
        barepp.write_trace(world, pipes[1].recorder, flags.trace)
    return [row_of(world, pipe, costs) for pipe in pipes], costs


def train_in_turns(
    pipes: Sequence[barepp.Pipeline], data: digits.Digits, flags: training.Flags
) -> None:
    """Let each pipeline take the same steps, some at a time: what slows one slows the other."""
    optimizers = [torch.optim.Adam(pipe.parameters(), lr=flags.lr) for pipe in pipes]
    for begin in range(0, flags.steps, TURN):
        for pipe, optimizer in zip(pipes, optimizers, strict=True):
            for step in range(begin, min(begin + TURN, flags.steps)):
                pipe.zero_grad()
                pipe.step(*digits.batch(data, step, flags.batch, flags.seed))
                optimizer.step()


def row_of(world: barepp.World, pipe: barepp.Pipeline, costs: list[barepp.LayerCost]) -> Row:
    """Put the figures of one partition together."""
    predicted_ms = bubble = 0.0
    if world.rank == 0:
        stages = barepp.stage_costs(costs, pipe.partition, pipe.schedule)
        timeline = barepp.simulate(pipe.schedule.order, len(pipe.partition), stages)
        predicted_ms, bubble = 1e3 * float(timeline.makespan), timeline.bubble
    summary = barepp.summarise(world, pipe.recorder, pipe.peak_in_flight)
    return Row(
        partition=pipe.partition,
        predicted_ms=predicted_ms,
        bubble_predicted=bubble,
        step_ms=summary.step_ms,
        bubble_measured=summary.bubble,
        parameters_sha256=pipe.parameters_sha256(),
    )


def report(rows: Sequence[Row], costs: Sequence[barepp.LayerCost]) -> str:
    """Return what a person reads: the layers, then both partitions."""
    lines = ["layer   forward   input   weights   kept      (ms and KiB of a microbatch)"]
    for index, cost in enumerate(costs):
        parts = (cost.forward_s, cost.backward_input_s, cost.backward_weight_s)
        times = [f"{1e3 * part:.2f}" for part in parts]
        kept = cost.kept_nbytes / 1024
        lines.append(f"{index:5d}{times[0]:>10}{times[1]:>8}{times[2]:>10}{kept:7.0f}")
    lines += ["", "partition   layers      predicted: step, bubble    measured: step, bubble"]
    for name, row in zip(("uniform", "balanced"), rows, strict=True):
        sizes = ",".join(map(str, row.partition))
        lines.append(
            f"{name:<11} {sizes:<10}{row.predicted_ms:8.1f} ms{row.bubble_predicted:9.1%}"
            f"{row.step_ms:15.1f} ms{row.bubble_measured:9.1%}"
        )
    uniform, balanced = rows
    ratio = balanced.step_ms / uniform.step_ms
    predicted = balanced.predicted_ms / uniform.predicted_ms
    lines.append(
        f"the balanced step takes {ratio:.2f} of the uniform one's time ({predicted:.2f} predicted)"
    )
    ranks, cores = len(balanced.partition), len(os.sched_getaffinity(0))
    if ranks > cores:
        lines.append(f"({ranks} ranks share {cores} cores: the prediction has a core for each)")
    same = balanced.parameters_sha256 == uniform.parameters_sha256
    lines.append(
        f"both have learnt the same, bit for bit: sha256 {balanced.parameters_sha256}"
        if same
        else "they have NOT learnt the same"
    )
    return "\n".join(lines)


def demo(world: barepp.World, flags: training.Flags) -> tuple[str, object]:
    """Do it all; return on rank 0 what a person reads and what --json writes."""
    training.check(flags, world)
    check_at_least(HEAVY + 1, flags, ["layers"])
    rows, costs = compare(world, flags)
    if world.rank != 0:  # only rank 0 has measured the layers
        return "", None
    return report(rows, costs), {
        "layers": [cost._asdict() for cost in costs],
        "partitions": [dataclasses.asdict(row) for row in rows],
    }


if __name__ == "__main__":
    run_demo(DEFAULTS, __doc__, demo, WITHOUT)
