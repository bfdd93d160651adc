"""What the training demos share: their flags, the training loop, and the summary at the end.

demos/naive.py, gpipe.py, one_f_one_b.py and those that follow differ in one word, the schedule;
everything else that they do is `train` below. Nothing in it knows how many ranks there are.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import barepp
import digits
from barepp.plan.simulate import Costs, simulate
from barepp.trace.step_breakdown import RankTimes, own_time, table
from barepp.train.stage.autocast import HALVES
from flags import check_at_least, check_positive, check_writable, run_demo
from transport.collectives import broadcast

import torch
from torch.nn import functional

NUM_PROGRESS_LINES = 10


@dataclasses.dataclass(frozen=True)
class Flags:
    """What a person can choose; the defaults learn the digits in a few seconds."""

    steps: int = 460  # 20 epochs
    batch: int = 64
    microbatches: int = 8
    stages: int = 0
    partition: str = "uniform"
    recompute: str = "off"
    autocast: str = "off"
    layers: int = 16
    hidden: int = 128
    seed: int = 0
    lr: float = 1e-3
    json: Path | None = None
    trace: Path | None = None


HELP = {
    "steps": "optimizer steps to take",
    "batch": "rows of a batch",
    "microbatches": "into how many microbatches a batch is cut",
    "stages": "slices of the model; 0 for what is usual: one a rank, or what the schedule needs",
    "partition": "uniform, balanced, or how many layers each stage gets: 5,4,4,4",
    "recompute": "which microbatches run their forward again in backward, to save memory",
    "autocast": "off, bf16 or fp16: matrix products in half precision",
    "layers": "hidden layers (Linear + ReLU); the head is one more",
    "hidden": "width of a hidden layer",
    "seed": "decides the initial weights and the order of the data",
    "lr": "learning rate of Adam at the start; it decays linearly to 0",
    "json": "write the results there",
    "trace": "write what each rank did when there, for Perfetto and python -m barepp.timeline",
}


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run came to: the object that --json writes."""

    schedule: str
    world_size: int
    stages: int
    partition: list[int]
    microbatches: int
    steps: int
    losses: list[float]  # one a step
    test_accuracy: float
    parameters_sha256: str
    step_ms: float  # median; forward and backward, without the optimizer
    bubble_measured: float
    bubble_predicted: float
    peak_in_flight: list[int]  # per rank, as are the times below: the mean of a step
    computing_ms: list[float]
    waiting_ms: list[float]
    moving_ms: list[float]
    ranks: list[RankTimes]  # the same and more: what each rank did all the time


def train(world: barepp.World, flags: Flags, schedule: str) -> Results:
    """Train the net on the digits through a pipeline; the same results on every rank."""
    training_set, test_set = digits.load()
    pipe = barepp.Pipeline(
        world,
        barepp.mlp(flags.layers, flags.hidden),
        functional.cross_entropy,
        schedule=schedule,
        num_stages=flags.stages or None,
        num_microbatches=flags.microbatches,
        partition=partition_of(flags.partition),
        seed=flags.seed,
        recompute=flags.recompute,
        autocast=precision_of(flags.autocast),
        sample=digits.batch(training_set, 0, flags.batch, flags.seed),
    )
    if flags.trace is not None:
        pipe.trace()
    # Each rank has an optimizer for its own layers: Adam treats each number by itself, so nothing
    # has to be agreed on.
    optimizer = torch.optim.Adam(pipe.parameters(), lr=flags.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / flags.steps)
    take_step = step_of(pipe, optimizer, flags.autocast)
    progress = Progress(flags.steps, silent=world.rank != 0)
    losses = []
    for step in range(flags.steps):
        images, labels = digits.batch(training_set, step, flags.batch, flags.seed)
        pipe.zero_grad()
        loss = pipe.step(images, labels)  # []
        if take_step():
            decay.step()
        losses.append(loss.item())
        progress.tell(step, losses[-1], len(labels))
    summary = barepp.summarise(world, pipe.recorder, pipe.peak_in_flight)
    if flags.trace is not None:
        barepp.write_trace(world, pipe.recorder, flags.trace)
    return Results(
        schedule=schedule,
        world_size=world.world_size,
        stages=pipe.schedule.num_stages,
        partition=pipe.partition,
        microbatches=flags.microbatches,
        steps=flags.steps,
        losses=losses,
        test_accuracy=accuracy(world, pipe, test_set),
        parameters_sha256=pipe.parameters_sha256(),
        step_ms=summary.step_ms,
        bubble_measured=summary.bubble,
        bubble_predicted=predicted_bubble(pipe.schedule, pipe.partition, flags),
        peak_in_flight=summary.peak_in_flight,
        computing_ms=summary.computing_ms,
        waiting_ms=summary.waiting_ms,
        moving_ms=summary.moving_ms,
        ranks=summary.ranks,
    )


def accuracy(world: barepp.World, pipe: barepp.Pipeline, data: digits.Digits) -> float:
    """Return on every rank which part of `data` the net names correctly."""
    pipe.eval()
    output = pipe.forward(data.images)  # [rows, 10] on the last stage's rank, else None
    right = None
    if isinstance(output, torch.Tensor):
        right = (output.argmax(1).cpu() == data.labels).double().mean()  # []
    shared = broadcast(world.transport, right, root=pipe.last_rank)
    assert isinstance(shared, torch.Tensor)
    return shared.item()


def partition_of(text: str) -> str | list[int]:
    """Return "5,4,4,4" as a list, and a word as it is: whether it means anything, others know."""
    if not text[:1].isdigit():
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise barepp.UsageError(
            f"--partition is uniform, balanced, or a number of layers for each stage, not {text}"
        ) from None


def precision_of(autocast: str) -> torch.dtype | None:
    """Return what a flag --autocast means."""
    if autocast not in ("off", *HALVES):
        raise barepp.UsageError(f"--autocast is off, {' or '.join(HALVES)}, not {autocast}")
    return HALVES.get(autocast)


def step_of(
    pipe: barepp.Pipeline, optimizer: torch.optim.Optimizer, autocast: str
) -> Callable[[], bool]:
    """Return what lets the optimizer step, and tells whether it did: with float16 not always."""
    if autocast == "fp16":
        return partial(barepp.LossScaler(pipe).step, optimizer)

    def step() -> bool:
        optimizer.step()
        return True

    return step


def predicted_bubble(schedule: barepp.Schedule, partition: list[int], flags: Flags) -> float:
    """Return what theory says: a backward costs twice a forward, a transfer nothing.

    Uniform stages count as equal; of others each layer does.
    """
    # A batch with fewer rows than microbatches makes as many microbatches as it has rows.
    num_microbatches = min(flags.microbatches, flags.batch)
    stages, ranks = schedule.num_stages, schedule.num_ranks
    order = barepp.make_schedule(schedule.name, stages, num_microbatches, ranks).order
    # Running the forward again comes on top. (One microbatch fewer of it is not a cost of a stage.)
    again = 0 if flags.recompute == "off" else 1
    cost = [1] * stages if flags.partition == "uniform" else partition
    inputs = [(1 + again) * one for one in cost]
    return simulate(order, stages, Costs(cost, inputs, cost)).bubble


class Progress:
    """Prints a line every so often: step, loss, images a second since the line before."""

    def __init__(self, num_steps: int, *, silent: bool = False) -> None:
        self._num_steps = num_steps
        self._every = max(1, num_steps // NUM_PROGRESS_LINES)
        self._silent = silent
        self._images = 0
        self._since = time.perf_counter()

    def tell(self, step: int, loss: float, num_images: int) -> None:
        """Take the result of a step (from 0)."""
        self._images += num_images
        done = step + 1
        if self._silent or (done % self._every and done != self._num_steps):
            return
        now = time.perf_counter()
        rate = self._images / (now - self._since)
        print(f"step {done:4d}/{self._num_steps}   loss {loss:.4f}   {rate:6.0f} images/s")
        self._images, self._since = 0, now


def report(results: Results) -> str:
    """Return the summary that a person reads at the end."""
    ranks, cores = results.world_size, len(os.sched_getaffinity(0))
    lines = [
        "",
        f"{results.schedule}, milliseconds a step:",
        *table(results.ranks),
        "",
        f"step            {results.step_ms:.2f} ms, the median of {results.steps}: forward and "
        "backward, without the optimizer",
        f"bubble          {results.bubble_predicted:.1%} predicted, {results.bubble_measured:.1%} "
        "measured: 1 - computing / (ranks * step)",
    ]
    if ranks > cores:
        shared = "1 core" if cores == 1 else f"{cores} cores"
        lines.append(
            f"                {ranks} ranks share {shared}: it contains waiting for a core"
        )
    lines += [
        own_time(results.ranks),
        f"parameters      sha256 {results.parameters_sha256}",
        f"test accuracy   {results.test_accuracy:.4f}",
    ]
    return "\n".join(lines)


def main(
    run: Callable[[barepp.World, Flags], Results], about: str | None, without: Collection[str] = ()
) -> None:
    """Run a training demo: join the world, read the flags, train, and let rank 0 tell.

    `without` names flags that would change nothing in it.
    """

    def demo(world: barepp.World, flags: Flags) -> tuple[str, object]:
        check(flags, world)
        results = run(world, flags)
        return report(results), dataclasses.asdict(results)

    run_demo(Flags(), HELP, about, demo, without)


def check(flags: Flags, world: barepp.World) -> None:
    """Find what cannot work before anything is built, sent or trained."""
    check_at_least(1, flags, ("steps", "batch", "microbatches", "layers", "hidden"))
    check_positive(flags, "lr")
    check_at_least(0, flags, ("stages",))
    if flags.layers + 1 < world.world_size:
        raise barepp.UsageError(
            f"{flags.layers} layers and the head are {flags.layers + 1} to share, too few for "
            f"{world.world_size} ranks: {flags.layers} layers allow {flags.layers + 1} ranks"
        )
    if world.rank == 0:  # the one rank that writes
        check_writable("--json", flags.json)
        check_writable("--trace", flags.trace)
