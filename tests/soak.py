"""Thousands of steps over a network that is late at random: what grows, and whether the bits hold.

    python tests/soak.py --steps 20000 [--world 3] [--delay 0.004] [--seed 1] [--checksum]

Real processes train a small pipeline over TCP, through a proxy that cuts every stream and delays
each piece by up to `--delay` seconds. Each rank looks at itself twenty times: resident memory,
Python's memory blocks, threads, descriptors; and rank 0 at the launcher. It prints what they were
half-way and at the end, and compares the parameters with those of one undisturbed process. The exit
code is 1 when anything has grown, or a bit is another one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

import networks  # noqa: E402
from jobs import Finished, run_job  # noqa: E402
from proxy import Network  # noqa: E402
from troubles import Pace  # noqa: E402

SAMPLES = 20
RESIDENT_NBYTES = 4 * 1024 * 1024  # what the allocators' own habits may come to
BLOCKS = 200  # Python's caches; an object that is kept each step is more, in a few hundred steps

SCRIPT = """
    import barepp, gc, json, os, psutil, sys, torch
    from barepp.trace.recorder import Recorder
    from transport.message import tensors
    STEPS, EVERY = {steps}, {every}
    def look(step, process):
        with process.oneshot():
            mine = dict(resident=process.memory_info().rss, threads=process.num_threads())
        return dict(mine, step=step, descriptors=process.num_fds())
    with barepp.init() as world:
        pipe = barepp.Pipeline(
            world, barepp.mlp(5, 24), torch.nn.functional.cross_entropy, num_microbatches=4
        )
        myself, launcher = psutil.Process(), psutil.Process(os.getppid())
        gc.collect()
        gc.freeze()  # what is imported stays; without it each look takes half a second
        for step in range(1, STEPS + 1):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(16, 64, generator=generator)
            labels = torch.randint(0, 10, (16,), generator=generator)
            pipe.zero_grad()
            pipe.step(images, labels)
            with torch.no_grad():
                for parameter in pipe.parameters():
                    parameter -= 0.05 * parameter.grad
            if step % EVERY == 0:
                world.barrier()
                if STEPS < 4000:  # it keeps the last thousand steps, so it grows until then
                    pipe.recorder = Recorder()
                tensors._view.cache_clear()  # bounded; how fast it fills, the allocator decides
                gc.collect()
                print(json.dumps(dict(look(step, myself), blocks=sys.getallocatedblocks())))
                if world.rank == 0:
                    print("launcher", json.dumps(dict(look(step, launcher), blocks=0)))
                world.barrier()  # or another rank would call us while we look
        print("learnt", pipe.parameters_sha256())
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a process looked like after a step."""

    step: int
    resident: int
    threads: int
    descriptors: int
    blocks: int

    def __str__(self) -> str:
        return (
            f"{self.resident / 2**20:7.1f} MiB resident, {self.blocks:7} blocks, "
            f"{self.threads:2} threads, {self.descriptors:3} descriptors"
        )


def samples(lines: Sequence[str], prefix: str = "") -> list[Sample]:
    """Read what a rank has printed of itself, or of the launcher."""
    wanted = [line[len(prefix) :] for line in lines if line.startswith(prefix + "{")]
    return [Sample(**json.loads(line)) for line in wanted]


def growth(name: str, found: Sequence[Sample]) -> list[str]:
    """Return what has grown since half-way, a sentence for each."""
    warm, last = found[len(found) // 2], found[-1]
    problems = []
    for what, most in (
        ("resident", RESIDENT_NBYTES),
        ("blocks", BLOCKS),
        ("threads", 0),
        ("descriptors", 0),
    ):
        before, after = getattr(warm, what), getattr(last, what)
        if after - before > most:
            steps = last.step - warm.step
            problems.append(f"{name}: {what} grew from {before} to {after} in {steps} steps")
    return problems


@dataclasses.dataclass(frozen=True)
class Soaked:
    """A run that has ended."""

    job: Finished
    learnt: list[str]
    expected: str
    looks: dict[str, list[Sample]]  # by process

    @property
    def problems(self) -> list[str]:
        """What is wrong with it."""
        if self.job.code:
            return [f"the job ended with {self.job.code}: {self.job.err}"]
        found = [problem for name, look in self.looks.items() for problem in growth(name, look)]
        wrong = [rank for rank, learnt in enumerate(self.learnt) if learnt != self.expected]
        return found + [f"rank {rank} has learnt other bits than one process" for rank in wrong]


def learnt(job: Finished, rank: int) -> str:
    """Return what a rank says its parameters are."""
    lines = [line for line in job.said(rank) if line.startswith("learnt ")]
    return lines[0] if lines else ""


def soak(
    folder: Path, steps: int, pace: Pace, world_size: int = 3, *, checksum: bool = False
) -> Soaked:
    """Train through the network, and once in one process without it."""
    script = SCRIPT.format(steps=steps, every=max(1, steps // SAMPLES))
    with Network() as network:
        job = networks.job(network, folder, script, world_size, [pace], checksum=checksum)
    looks = {f"rank {rank}": samples(job.said(rank)) for rank in range(world_size)}
    looks["launcher"] = samples(job.said(0), "launcher ")
    with tempfile.TemporaryDirectory() as other:
        alone = run_job(Path(other), script, 1)
    words = [learnt(job, rank) for rank in range(world_size)]
    return Soaked(job, words, learnt(alone, 0), looks)


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="soak.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--world", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.004, help="the longest, in seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checksum", action="store_true")
    parsed = parser.parse_args(arguments)
    pace = Pace(parsed.seed, largest=400, delay_s=parsed.delay)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soaked = soak(Path(folder), parsed.steps, pace, parsed.world, checksum=parsed.checksum)
    print(f"{parsed.steps} steps, seed {parsed.seed}, {time.monotonic() - began:.0f} s")
    for name, looks in soaked.looks.items():
        if looks:
            print(f"{name:<9} half-way   {looks[len(looks) // 2]}\n{'':<9} at the end {looks[-1]}")
    problems = soaked.problems
    print("\n".join(problems) or f"nothing has grown, and every rank has {soaked.expected}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
