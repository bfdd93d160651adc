"""The script that torchrun runs when faults are measured: the same training over gloo.

The stages, the 1F1B order and who sends to whom are barepp's own; the messages are torch's. It is
as kind to torch as it can be: `record`, so that its report has the traceback, and a timeout of
seconds instead of half an hour.
"""

from __future__ import annotations

import datetime
import os
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # before torch comes

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from barepp.bench.faults.kinds import GLOO_S, MICROBATCHES, VICTIM, WORLD_SIZE, Fault  # noqa: E402
from barepp.bench.faults.ranks import (  # noqa: E402
    HIDDEN,
    NOBODY_SENDS,
    ROWS,
    SHORT,
    STEPS,
    Witness,
    falls_out,
    faulty_layers,
    orders,
    stay_away_if_told,
)
from barepp.plan.partition import partition  # noqa: E402
from barepp.program.actions import Kind  # noqa: E402
from barepp.program.lowering import Step, activation_tag, gradient_tag, lower  # noqa: E402
from barepp.schedules import make_schedule  # noqa: E402
from barepp.train.stage.boundary import Gradient, Value  # noqa: E402
from barepp.train.stage.stage import Stage  # noqa: E402


@record
def main() -> None:
    """Train, and say when this rank notices that another one failed."""
    fault, witness = orders(int(os.environ["RANK"]))
    witness.say("joining")
    stay_away_if_told(fault, witness)
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=GLOO_S))
        _train(fault, witness)
        if fault.name == "none":
            dist.destroy_process_group()
    except BaseException as error:
        witness.say("told", f"{type(error).__name__}: {error}")
        raise


def _train(fault: Fault, witness: Witness) -> None:
    torch.set_num_threads(1)
    layers = faulty_layers(fault, witness)
    held = partition(len(layers), WORLD_SIZE)[witness.rank]
    loss = torch.nn.functional.cross_entropy
    stage = Stage(witness.rank, held, WORLD_SIZE, layers, loss, seed=0)
    order = make_schedule("1f1b", WORLD_SIZE, MICROBATCHES).order
    program = lower(order, WORLD_SIZE)[witness.rank]
    optimizer = torch.optim.SGD(stage.parameters(), lr=1e-3)
    inputs = torch.randn(ROWS, 64).chunk(MICROBATCHES)
    for step in range(STEPS if fault.name != "none" else SHORT):
        if falls_out(fault, witness, step):
            if fault.name == "return":
                return
            dist.recv(torch.empty(1), VICTIM + 1, tag=NOBODY_SENDS)
        optimizer.zero_grad()
        sends = [_act(stage, action, inputs, step) for action in program]
        for send in sends:
            if send is not None:
                send[0].wait()
        optimizer.step()


def _act(
    stage: Stage, todo: Step, inputs: tuple[torch.Tensor, ...], step: int
) -> tuple[dist.Work, torch.Tensor] | None:
    """Receive, compute and start to send; return the send with what it still reads."""
    (index, kind, microbatch), source, target = todo
    taken = None
    rows = ROWS // MICROBATCHES
    if source is not None:
        taken = torch.empty(rows, HIDDEN)
        named = activation_tag if kind is Kind.F else gradient_tag
        dist.recv(taken, source, tag=named(index, microbatch))
    if kind is Kind.F:
        value = taken if taken is not None else inputs[microbatch]
        labels = torch.zeros(rows, dtype=torch.int64)
        made: Value | Gradient = stage.forward(
            microbatch, value, step=step, target=labels, loss_weight=1 / MICROBATCHES
        )
    else:
        made = stage.backward(microbatch, taken)
    if target is None:
        return None
    assert isinstance(made, torch.Tensor)
    named = activation_tag if kind is Kind.F else gradient_tag
    work = dist.isend(made, target, tag=named(target, microbatch))
    assert work is not None
    return work, made


if __name__ == "__main__":
    main()
