"""What the training demos share: their flags, the results and the printing.

The training loop is in each demo. Here is the rest: `main` joins the world, reads the flags and
prints the report. What only those with a pipeline share is in follower.py.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import barepp
from flags import check_at_least, check_positive, check_writable, flag, run_demo

import torch

NUM_PROGRESS_LINES = 5
COMPARED_STEPS = 20  # that one process repeats at the end
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Flags:
    """What a person can choose; with the defaults the digits are learnt in a few seconds."""

    steps: int = flag(460, "optimizer steps to take")  # 20 epochs
    batch: int = flag(64, "rows of a batch")
    microbatches: int = flag(8, "into how many microbatches a batch is cut")
    stages: int = flag(0, "slices of the model; 0: one a rank, or what the schedule needs")
    partition: str = flag("uniform", "uniform, balanced, or the layers of each stage: 5,4,4,4")
    recompute: str = flag("off", "off, all or all_but_last: run forwards again, to save memory")
    autocast: str = flag("off", "off, bf16 or fp16: matrix products in half precision")
    layers: int = flag(16, "hidden layers (Linear + ReLU); the head is one more")
    hidden: int = flag(128, "width of a hidden layer")
    seed: int = flag(0, "decides the initial weights and the order of the data")
    lr: float = flag(1e-3, "learning rate of Adam at the start; it decays linearly to 0")
    json: Path | None = flag(None, "write the results there")
    trace: Path | None = flag(None, "write what each rank did when, for python -m barepp.timeline")
    verbose: bool = flag(False, "print where the time of a step went, rank by rank")


Results = dict[str, Any]
"""What --json writes; `results_of` makes it."""


def pipeline_options(flags: Any) -> dict[str, Any]:
    """Return the arguments of `barepp.Pipeline` that most people leave as they are."""
    return {
        "num_stages": flags.stages or None,
        "partition": partition_of(flags.partition),
        "recompute": flags.recompute,
        "autocast": precision_of(flags.autocast),
    }


def partition_of(text: str) -> str | list[int]:
    """Return "5,4,4,4" as a list, and a word unchanged: `Pipeline` checks it."""
    if not text[:1].isdigit():
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise barepp.UsageError(
            f"--partition is uniform, balanced, or a number of layers for each stage, not {text}"
        ) from None


def precision_of(autocast: str) -> torch.dtype | None:
    """Return the dtype that the flag --autocast names."""
    if autocast not in ("off", *HALVES):
        raise barepp.UsageError(f"--autocast is off, {' or '.join(HALVES)}, not {autocast}")
    return HALVES.get(autocast)


class Progress:
    """Prints a line now and then: step, loss, images a second since the line before."""

    def __init__(self, num_steps: int, *, silent: bool = False) -> None:
        self.losses: list[float] = []
        self._num_steps = num_steps
        self._every = max(1, num_steps // NUM_PROGRESS_LINES)
        self._silent = silent
        self._images = 0
        self._since = time.perf_counter()

    def after_step(self, loss: torch.Tensor, num_images: int) -> None:
        """Take the result of the next step."""
        self.losses.append(loss.item())
        self._images += num_images
        done = len(self.losses)
        if self._silent or (done % self._every and done != self._num_steps):
            return
        now = time.perf_counter()
        rate = self._images / (now - self._since)
        print(
            f"step {done:4d}/{self._num_steps}   loss {self.losses[-1]:.4f}   {rate:6.0f} images/s"
        )
        self._images, self._since = 0, now


def results_of(
    world: barepp.World,
    flags: Flags,
    recorder: barepp.Recorder,
    peak_in_flight: int,
    **others: Any,
) -> Results:
    """Put the results together: what the recorder has measured, and `others`; collective."""
    if flags.trace is not None:
        barepp.write_trace(world, recorder, flags.trace)
    summary = barepp.summarise(world, recorder, peak_in_flight)
    if flags.verbose and world.rank == 0:
        print(f"\nmilliseconds a step, the median {summary.step_ms:.2f}:\n{summary.table()}")
    return {
        "world_size": world.world_size,
        "microbatches": flags.microbatches,
        "steps": flags.steps,
        "step_ms": summary.step_ms,  # median; forward and backward, without the optimizer
        "bubble_measured": summary.bubble,
        "peak_in_flight": summary.peak_in_flight,  # per rank, as are the times: the mean of a step
        "computing_ms": summary.computing_ms,
        "waiting_ms": summary.waiting_ms,
        "moving_ms": summary.moving_ms,
        "ranks": list(map(dataclasses.asdict, summary.ranks)),  # the same, and more
        **others,
    }


def predicted_bubble(schedule: barepp.Schedule, partition: list[int], flags: Flags) -> float:
    """Return what theory says: a backward costs twice a forward, a transfer nothing.

    Uniform stages cost the same; otherwise each layer does.
    """
    # A batch with fewer rows than microbatches makes as many microbatches as it has rows.
    num_microbatches = min(flags.microbatches, flags.batch)
    stages, ranks = schedule.num_stages, schedule.num_ranks
    order = barepp.make_schedule(schedule.name, stages, num_microbatches, ranks).order
    # Running the forward again comes on top. (One microbatch fewer of it is not a cost of a stage.)
    again = 0 if flags.recompute == "off" else 1
    cost = [1] * stages if flags.partition == "uniform" else partition
    inputs = [(1 + again) * one for one in cost]
    return barepp.simulate(order, stages, barepp.Costs(cost, inputs, cost)).bubble


def report(results: Results) -> str:
    """Return the lines that a person reads at the end."""
    compared = min(COMPARED_STEPS, results["steps"])
    same = {
        True: f"yes (one process has repeated the first {compared} steps: equal parameters)",
        False: f"NO (one process has repeated the first {compared} steps: other parameters)",
        None: "not compared (only on the CPU, with one thread a rank and without --autocast)",
    }
    return "\n".join(
        [
            "",
            f"test accuracy   {results['test_accuracy']:.4f}",
            f"parameters      sha256 {results['parameters_sha256']}",
            f"the same bits as one process: {same[results['same_bits']]}",
            f"bubble          {results['bubble_predicted']:.1%} predicted, "
            f"{results['bubble_measured']:.1%} measured: "
            "the time in which ranks are idle",
            f"                {why_they_differ(results['world_size'])}",
            f"in flight       {in_flight(results['peak_in_flight'])}",
            "look next       --verbose prints where the time went, --trace FILE records all of it;",
            '                README.md, "The course, in order", has the next step',
        ]
    )


def in_flight(peaks: list[int]) -> str:
    """Return how many microbatches each rank has kept at one time, in words."""
    ranks = ", ".join(map(str, range(len(peaks))))
    return f"at most {', '.join(map(str, peaks))} microbatches (rank {ranks})"


def why_they_differ(ranks: int) -> str:
    """Return why more of the time is lost than the schedule alone loses."""
    cores = len(os.sched_getaffinity(0))
    left_out = "messages and Python take time, which the prediction leaves out"
    if ranks <= cores:
        return f"They differ because {left_out}."
    shared = "1 core" if cores == 1 else f"{cores} cores"
    return f"They differ because {ranks} ranks share {shared}, and because {left_out}."


def main(
    train: Callable[[barepp.World, Flags], Results],
    about: str | None,
    *,
    without: Collection[str] = (),
    report: Callable[[Results], str] = report,
) -> None:
    """Run a training demo: join the world, read the flags, train; rank 0 prints the report.

    `without` names flags that would change nothing in it.
    """

    def demo(world: barepp.World, flags: Flags) -> tuple[str, object]:
        check(flags, world)
        results = train(world, flags)
        return report(results), results

    run_demo(Flags(), about, demo, without)


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
