"""What the ranks train when faults are measured, under barepp.launch and under torchrun.

    script.py barepp FAULT FOLDER
    script.py torchrun FAULT FOLDER

Under torchrun the stages, the 1F1B order and who sends to whom are barepp's own; the messages are
gloo's. It is as kind to torch as it can be: `record`, so that the report has the traceback, and a
timeout of seconds instead of half an hour. In the folder each rank notes what happens to it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator

import barepp  # before torch, whose warning that NumPy is missing it silences

# isort: split
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy

from barepp.bench.faults.kinds import (
    BAREPP,
    GLOO_S,
    MICROBATCHES,
    NOTES,
    STEP,
    VICTIM,
    WORLD_SIZE,
    injected,
)
from barepp.plan.partition import partition
from barepp.program.actions import Action, Kind
from barepp.program.lowering import Step, activation_tag, gradient_tag, lower
from barepp.schedules import make_schedule
from barepp.train.models import mlp
from barepp.train.stage.stage import Stage
from barepp.worker.faults.fault_hook import FaultHook

ROWS = 64
HIDDEN = 128
LAYERS = mlp(16, HIDDEN)
TEXT_LIMIT = 1500  # of an error: the note has to stay below PIPE_BUF, to arrive in one piece


@contextlib.contextmanager
def noting(rank: int) -> Iterator[FaultHook | None]:
    """Note which process this rank is, when its fault comes, and the error that ends its block."""
    fault, folder = sys.argv[2:]
    pipe = os.open(os.path.join(folder, NOTES), os.O_WRONLY)

    def note(event: str, **fields: object) -> None:
        record = {"event": event, "rank": rank, "monotonic": time.monotonic(), **fields}
        os.write(pipe, json.dumps(record).encode() + b"\n")

    note("training", pid=os.getpid())
    try:
        yield FaultHook(injected(fault), note) if rank == VICTIM else None
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".encode("ascii", "replace").decode()
        note("told", text=text[:TEXT_LIMIT])
        raise


def train_barepp() -> None:
    """Train with barepp's pipeline."""
    with barepp.init() as world, noting(world.rank) as world.fault_hook:
        pipe = barepp.Pipeline(
            world, LAYERS, cross_entropy, schedule="1f1b", num_microbatches=MICROBATCHES
        )
        optimizer = torch.optim.SGD(pipe.parameters(), lr=1e-3)
        inputs, targets = torch.randn(ROWS, 64), torch.zeros(ROWS, dtype=torch.int64)
        for _ in range(STEP + 1):
            pipe.zero_grad()
            pipe.step(inputs, targets)
            optimizer.step()


@record
def train_torch() -> None:
    """Train the same over gloo."""
    rank = int(os.environ["RANK"])
    with noting(rank) as hook:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=GLOO_S))
        torch.set_num_threads(1)
        held = partition(len(LAYERS), WORLD_SIZE)[rank]
        stage = Stage(rank, held, WORLD_SIZE, LAYERS, cross_entropy, seed=0)
        program = lower(make_schedule("1f1b", WORLD_SIZE, MICROBATCHES).order, WORLD_SIZE)[rank]
        optimizer = torch.optim.SGD(stage.parameters(), lr=1e-3)
        rows = ROWS // MICROBATCHES
        inputs, labels = torch.randn(rows, 64), torch.zeros(rows, dtype=torch.int64)
        tags = {Kind.F: activation_tag, Kind.B: gradient_tag}

        sends = []

        def compute(action: Action, taken: torch.Tensor | None) -> torch.Tensor | None:
            made: object
            if action.kind is Kind.F:
                value = inputs if taken is None else taken
                made = stage.forward(
                    action.microbatch, value, step=step, target=labels, loss_weight=1 / MICROBATCHES
                )
            else:
                made = stage.backward(action.microbatch, taken)
            assert made is None or isinstance(made, torch.Tensor)
            return made

        def give(own: Step, made: torch.Tensor | None) -> None:
            action, _, target = own
            if target is not None and made is not None:
                tag = tags[action.kind](target, action.microbatch)
                # gloo reads the tensor until the send is over
                sends.append((dist.isend(made, target, tag=tag), made))

        for step in range(STEP + 1):
            optimizer.zero_grad()
            sends.clear()
            around = hook.around if hook is not None else lambda run, hand_on, *_: (run, hand_on)
            run, hand_on = around(compute, give, program, step)
            for own in program:
                action, source, _ = own
                taken = None
                if source is not None:
                    taken = torch.empty(rows, HIDDEN)
                    tag = tags[action.kind](action.stage, action.microbatch)
                    dist.recv(taken, source, tag=tag)
                hand_on(own, run(action, taken))
            for work, _ in sends:
                assert work is not None
                work.wait()
            optimizer.step()


if __name__ == "__main__":
    train_barepp() if sys.argv[1] == BAREPP else train_torch()
