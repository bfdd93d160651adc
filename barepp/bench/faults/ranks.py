"""What happens in the ranks of a job that is about to fail: the model, the fault, the timestamps.

Both scripts, ours and torch's, train this model with these faults, so that what differs is only
who carries the messages. All times are CLOCK_MONOTONIC, which the processes of one host share.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

from barepp.bench.faults.kinds import (
    ASLEEP,
    FAULTS,
    MICROBATCH,
    MICROBATCHES,
    NO_FAULT,
    RECORDS,
    SLEEPER,
    STEP,
    VICTIM,
    WORLD_SIZE,
    Fault,
    Where,
)
from barepp.plan.partition import partition
from barepp.train.models import LayerBuilder, mlp

STEPS: Final = 1_000_000  # of a training that only its fault can end
SHORT: Final = 3  # steps of a training without one
ROWS: Final = 64
HIDDEN: Final = 128
NOBODY_SENDS: Final = 99  # the tag of a message that never comes
_NUM_LAYERS: Final = 16
_TEXT_LIMIT: Final = 1500  # a record has to stay below PIPE_BUF, 4096 bytes, to arrive in one piece


class Witness:
    """One rank's end of the named pipe; each record is one line of JSON, written in one piece."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self._fd = os.open(folder / RECORDS, os.O_WRONLY)

    def say(self, what: str, text: str = "") -> None:
        """Record that `what` happened now."""
        at_ns = time.monotonic_ns()
        short = text.encode("ascii", "replace").decode()[:_TEXT_LIMIT]
        fields = {"rank": self.rank, "pid": os.getpid(), "what": what, "at_ns": at_ns}
        os.write(self._fd, json.dumps({**fields, "text": short}).encode() + b"\n")


def orders(rank: int) -> tuple[Fault, Witness]:
    """Read the script's arguments: the fault's name, and the folder of the named pipes."""
    name, folder = sys.argv[1:]
    return FAULTS.get(name, NO_FAULT), Witness(Path(folder), rank)


def stay_away_if_told(fault: Fault, witness: Witness) -> None:
    """The rank that never arrives: its process lives, and never joins the others."""
    if fault.where is Where.BEFORE and witness.rank == VICTIM:
        time.sleep(3600)


def falls_out(fault: Fault, witness: Witness, step: int) -> bool:
    """Whether this rank now leaves the loop, or its right way through it; says so if it does."""
    due = fault.where is Where.LOOP and witness.rank == VICTIM and step == STEP
    if due:
        witness.say("fault")
    return due


def faulty_layers(fault: Fault, witness: Witness) -> list[LayerBuilder]:
    """Return the model's layers; the first one of a rank that misbehaves does so when it is due."""
    layers = mlp(_NUM_LAYERS, HIDDEN)
    first = partition(len(layers), WORLD_SIZE)[witness.rank].start
    act = _act(fault, witness)
    if act is not None:
        # In the fault "busy" the victim dies one microbatch earlier: in none that the sleeper,
        # two stages before it, has not passed on yet.
        early = fault.name == "busy" and witness.rank == VICTIM
        call = STEP * MICROBATCHES + MICROBATCH - early
        layers[first] = partial(FaultyLayer, layers[first], call, act)
    return layers


class FaultyLayer(nn.Module):
    """A layer that calls `act` in its forward number `call`, counted from 0."""

    def __init__(self, build: LayerBuilder, call: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.layer = build()
        self._left = call
        self._act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's own output."""
        if self._left == 0:
            self._act()
        self._left -= 1
        return self.layer(x)  # type: ignore[no-any-return]


def _act(fault: Fault, witness: Witness) -> Callable[[], None] | None:
    """Return what this rank does when it is due; None when it behaves well."""
    if fault.name == "busy" and witness.rank == SLEEPER:
        return partial(_fall_asleep, witness)
    if witness.rank != VICTIM or fault.where not in (Where.LAYER, Where.LAUNCHER):
        return None
    return partial(_commit, fault, witness)


def _fall_asleep(witness: Witness) -> None:
    """Be busy elsewhere, in a call that knows nothing of barepp."""
    os.close(os.open(witness.folder / ASLEEP, os.O_WRONLY))  # blocks until the victim opens it too
    time.sleep(3600)


def _commit(fault: Fault, witness: Witness) -> None:
    if fault.name == "busy":
        os.close(os.open(witness.folder / ASLEEP, os.O_RDONLY))  # until the sleeper is there
    witness.say("fault")
    if fault.where is Where.LAYER:
        _ACTS[fault.name]()


def _loop() -> None:
    while True:
        pass


def _raise() -> None:
    raise ValueError("injected")


_ACTS: Final[Mapping[str, Callable[[], object]]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "busy": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segv": lambda: ctypes.string_at(0),
    "abrt": os.abort,
    "exit0": lambda: os._exit(0),
    "exit7": lambda: os._exit(7),
    "sysexit3": lambda: sys.exit(3),
    "exception": _raise,
    "loop": _loop,
    "sleep": lambda: time.sleep(3600),
}
