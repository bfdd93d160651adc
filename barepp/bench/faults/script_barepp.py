"""The script that barepp.launch runs when faults are measured: 1F1B until the fault ends it."""

from __future__ import annotations

import multiprocessing
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # before torch comes

import torch  # noqa: E402

import barepp  # noqa: E402
from barepp.bench.faults.kinds import MICROBATCHES, VICTIM, Fault  # noqa: E402
from barepp.bench.faults.ranks import (  # noqa: E402
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


def main() -> None:
    """Train, and say when this rank is told that another one failed."""
    # Who a rank is, it learns by joining; one that never joins has only its process's name.
    fault, witness = orders(int(multiprocessing.current_process().name.rpartition("-")[2]))
    witness.say("joining")
    stay_away_if_told(fault, witness)
    try:
        with barepp.init() as world:
            _train(world, fault, witness)
    except BaseException as error:
        witness.say("told", f"{type(error).__name__}: {error}")
        raise


def _train(world: barepp.World, fault: Fault, witness: Witness) -> None:
    layers = faulty_layers(fault, witness)
    loss = torch.nn.functional.cross_entropy
    pipe = barepp.Pipeline(world, layers, loss, schedule="1f1b", num_microbatches=MICROBATCHES)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=1e-3)
    inputs, targets = torch.randn(ROWS, 64), torch.zeros(ROWS, dtype=torch.int64)
    for step in range(STEPS if fault.name != "none" else SHORT):
        if falls_out(fault, witness, step):
            if fault.name == "return":
                return
            world.recv(VICTIM + 1, NOBODY_SENDS)
        pipe.zero_grad()
        pipe.step(inputs, targets)
        optimizer.step()


if __name__ == "__main__":
    main()
