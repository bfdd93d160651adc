"""Step 16 of the course: a transformer that learns to write Python, byte by byte, in a pipeline.

    python -m barepp.launch --world 4 demos/gpt.py

ends with

    held out        3.…
    it writes       'def …

A GPT (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") without a
tokenizer: its 256 words are the bytes. It reads the standard library's own sources, or any file
(`--text PATH`), and predicts each byte from those before it. The measure is bits per byte, which is
the cross-entropy in base 2: a model that knows nothing needs 8, `gzip` about 2 for Python.

    embedding → [attention → feed-forward] × blocks → head

Attention and feed-forward are layers of their own, so that a model of few blocks can be cut into
many stages. Each adds its result to its input: one tensor goes from layer to layer, and two ranks
exchange nothing else. Dropout is on, and the parameters are still those of one process,
bit for bit, on any number of ranks: masks depend on the layer, the step and the microbatch alone.

At the end it writes. For every byte the text goes once through the whole pipeline; the last rank
draws the byte and sends it to the others. That is slow on purpose (nothing is cached) and shows
what inference through a pipeline costs: while one rank works the others wait.

You can now say: random numbers depend on the seed, the layer, the step and the microbatch, never
on the rank: dropout is the same wherever the model is cut.
"""

import dataclasses
import math
import sysconfig
import time
from pathlib import Path

import barepp
import training
from flags import check_at_least, check_positive, check_writable, flag, run_demo
from gpt_model import gpt, loss_fn

import torch
from torch import Tensor

HELD_OUT = 0.05  # of the text, at its end
HELD_OUT_ROWS = 32
TEXT_NBYTES = 16 * 2**20  # of a longer text the first part is used
PROMPT = b"def "
TEMPERATURE = 0.8  # below 1 it prefers what is likely


@dataclasses.dataclass(frozen=True)
class Flags:
    """What a person can choose; with the defaults it takes a minute or two on two cores."""

    steps: int = flag(200, "optimizer steps to take")
    batch: int = flag(16, "rows of a batch")
    microbatches: int = flag(8, "into how many microbatches a batch is cut")
    schedule: str = flag("1f1b", f"{', '.join(barepp.schedule_names())}, or file.py:function")
    stages: int = flag(0, "slices of the model; 0: one a rank, or what the schedule needs")
    partition: str = flag("uniform", "uniform, balanced, or the layers of each stage: 3,2,2,3")
    recompute: str = flag("off", "off, all or all_but_last: run forwards again, to save memory")
    autocast: str = flag("off", "off, bf16 or fp16: matrix products in half precision")
    blocks: int = flag(4, "transformer blocks, two layers each; embedding and head are two more")
    width: int = flag(128, "numbers that stand for one byte on its way from layer to layer")
    heads: int = flag(4, "attention heads; they divide the width")
    context: int = flag(128, "bytes that it sees at once")
    dropout: float = flag(0.1, "part of the numbers that is left out while training")
    seed: int = flag(0, "decides the initial weights and the order of the data")
    lr: float = flag(2e-3, "learning rate of AdamW at its highest")
    write: int = flag(160, "bytes to write at the end")
    text: Path | None = flag(None, "the file to learn from; default: Python's standard library")
    json: Path | None = flag(None, "write the results there")
    trace: Path | None = flag(None, "write what each rank did when, for python -m barepp.timeline")
    verbose: bool = flag(False, "print where the time of a step went, rank by rank")


def check(flags: Flags, world: barepp.World) -> None:
    """Find what cannot work before anything is built, sent or trained."""
    check_at_least(1, flags, ("steps", "batch", "microbatches", "blocks", "width", "heads"))
    check_at_least(len(PROMPT), flags, ("context",))
    check_at_least(0, flags, ("stages", "write"))
    check_positive(flags, "lr")
    if flags.width % flags.heads:
        raise barepp.UsageError(f"--width {flags.width} does not divide into {flags.heads} heads")
    if not 0 <= flags.dropout < 1:
        raise barepp.UsageError(f"--dropout is {flags.dropout}; it must be from 0 to below 1")
    if world.rank == 0:  # the one rank that writes
        check_writable("--json", flags.json)
        check_writable("--trace", flags.trace)


# -- the text ------------------------------------------------------------------------------------


def read_text(path: Path | None) -> Tensor:
    """Return a file's bytes, or by default the standard library's sources: [length] uint8."""
    if path is not None:
        try:
            text = path.read_bytes()[:TEXT_NBYTES]
        except OSError as error:
            reason = error.strerror or error
            raise barepp.DataError(f"--text {path} cannot be read: {reason}") from error
    else:
        library = Path(sysconfig.get_path("stdlib"))
        text = b"".join(source.read_bytes() for source in sorted(library.glob("*.py")))
    return torch.frombuffer(bytearray(text or b"\n"), dtype=torch.uint8)


def share_text(world: barepp.World, flags: Flags) -> tuple[Tensor, Tensor]:
    """Return what is learnt from and what is held out, the same on every rank: rank 0's."""
    text = world.broadcast(read_text(flags.text) if world.rank == 0 else None, root=0)
    held_out = max(int(len(text) * HELD_OUT), flags.context + 1)
    if len(text) < 2 * held_out:
        raise barepp.DataError(
            f"the text has {len(text)} bytes; a context of {flags.context} needs {2 * held_out}"
        )
    return text[:-held_out], text[-held_out:]


def excerpts(text: Tensor, rows: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `rows` random excerpts and, of each place, the byte that follows: [rows, context]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - context, (rows, 1), generator=generator)
    places = starts + torch.arange(context)  # [rows, context]
    return text[places].long(), text[places + 1].long()


# -- training and writing ------------------------------------------------------------------------


def train(
    world: barepp.World, pipe: barepp.Pipeline, learnt: Tensor, flags: Flags
) -> tuple[list[float], float]:
    """Train the pipeline; return the loss of each step, in bits a byte, and the seconds a step."""
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=flags.lr, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: part_of_rate(step, flags))
    scaler = barepp.LossScaler(pipe, enabled=flags.autocast == "fp16")  # for --autocast fp16 only
    every = max(1, flags.steps // training.NUM_PROGRESS_LINES)
    losses = []
    began = time.perf_counter()
    for step in range(flags.steps):
        if step == 1:  # the first one warms up
            began = now(world)
        seed = barepp.derive_seed(flags.seed, "excerpts", step=step)
        text, following = excerpts(learnt, flags.batch, flags.context, seed)
        pipe.zero_grad()
        losses.append(bits(pipe.step(text, following)))
        if scaler.step(optimizer):  # optimizer.step(); float16 sometimes has to skip it
            rate.step()
        if world.rank == 0 and ((step + 1) % every == 0 or step + 1 == flags.steps):
            print(f"step {step + 1:4d}/{flags.steps}   {losses[-1]:.3f} bits a byte")
    return losses, (now(world) - began) / max(1, flags.steps - 1)


def now(world: barepp.World) -> float:
    """Return the time in seconds at which the device has done all that it was given."""
    world.synchronize()  # a GPU does what it is given later: without this we would measure Python
    return time.perf_counter()


def part_of_rate(step: int, flags: Flags) -> float:
    """Return the part of --lr that a step uses: a tenth of the steps to warm up, then a cosine."""
    warmup = max(1, flags.steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    # (A scheduler also asks for the step behind the last one, and of one step all is warmup.)
    past = (step - warmup) / max(1, flags.steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * past))


def bits(nats: Tensor) -> float:
    """Return a cross-entropy in base 2."""
    return nats.item() / math.log(2)


def write(world: barepp.World, pipe: barepp.Pipeline, flags: Flags) -> str:
    """Return `PROMPT` and what the model puts behind it, the same on every rank."""
    pipe.eval()
    text = list(PROMPT)
    generator = torch.Generator().manual_seed(barepp.derive_seed(flags.seed, "writing"))
    for _ in range(flags.write):
        scores = pipe.forward(torch.tensor([text[-flags.context :]]))  # [1, length, 256]
        drawn = None
        if isinstance(scores, Tensor):  # on the rank of the last stage
            likely = (scores[0, -1].cpu().float() / TEMPERATURE).softmax(0)  # [256]
            drawn = torch.multinomial(likely, 1, generator=generator)  # [1]
        drawn = world.broadcast(drawn, root=pipe.last_rank)
        text.append(int(drawn))
    return bytes(text).decode(errors="replace")


def run(world: barepp.World, flags: Flags) -> training.Results:
    """Train, measure and write; the same results on every rank."""
    learnt, held_out = share_text(world, flags)
    pipe = barepp.Pipeline(
        world,
        gpt(flags),
        loss_fn,
        schedule=flags.schedule,
        num_microbatches=flags.microbatches,
        seed=flags.seed,
        sample=excerpts(learnt, flags.batch, flags.context, seed=0),  # for --partition balanced
        **training.pipeline_options(flags),
    )
    if flags.trace is not None:
        pipe.trace()
    losses, step_s = train(world, pipe, learnt, flags)
    summary = barepp.summarise(world, pipe.recorder, pipe.peak_in_flight)
    if flags.verbose and world.rank == 0:
        print(f"\n{flags.schedule}, milliseconds a step:\n{summary.table()}\n")
    if flags.trace is not None:
        barepp.write_trace(world, pipe.recorder, flags.trace)
    return {
        "schedule": flags.schedule,
        "world_size": world.world_size,
        "stages": pipe.schedule.num_stages,
        "partition": pipe.partition,
        "microbatches": flags.microbatches,
        "steps": flags.steps,
        "losses": losses,  # bits a byte, one a step
        "held_out": bits(pipe.evaluate(*excerpts(held_out, HELD_OUT_ROWS, flags.context, seed=0))),
        "parameters_sha256": pipe.parameters_sha256(),
        "step_ms": summary.step_ms,  # median; forward and backward, without the optimizer
        "tokens_per_s": flags.batch * flags.context / step_s,  # bytes, the optimizer included
        "bubble_measured": summary.bubble,
        "peak_in_flight": summary.peak_in_flight,  # per rank
        "ranks": list(map(dataclasses.asdict, summary.ranks)),
        "written": write(world, pipe, flags),
    }


def report(results: training.Results) -> str:
    """Return what a person reads at the end."""
    step = f"{results['step_ms']:.1f} ms, {results['tokens_per_s']:.0f} bytes/s"
    return f"""
step            {step}
bubble          {results["bubble_measured"]:.1%} measured: the time in which ranks are idle
in flight       {training.in_flight(results["peak_in_flight"])}
parameters      sha256 {results["parameters_sha256"]}
held out        {results["held_out"]:.3f} bits a byte
it writes       {results["written"]!r}"""


def demo(world: barepp.World, flags: Flags) -> tuple[str, object]:
    """Do it all; return what a person reads and what --json writes."""
    check(flags, world)
    results = run(world, flags)
    return report(results), results


if __name__ == "__main__":
    run_demo(Flags(), __doc__, demo)
