"""The cases of test_fault_matrix.py: all of them, and a sample of them that a seed decides."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from functools import cache
from itertools import zip_longest
from typing import Final

import torch

import barepp
from barepp.program.actions import Order
from barepp.worker.faults.kinds import WHEN
from barepp.worker.world import World
from transport.errors import UnknownTransport
from transport.registry import transport_class, transport_names

WORLD_SIZES: Final = (2, 3, 4)
MICROBATCHES: Final = 4
STEPS: Final = 2
THREADS: Final = "inproc"
LAYERS: Final = 16  # two for each of the eight stages that four ranks have at most


@dataclasses.dataclass(frozen=True)
class Case:
    """One rank, killed at one action."""

    schedule: str
    world_size: int
    transport: str
    rank: int
    step: int
    at: str
    when: str

    @property
    def fault(self) -> str:
        return "raise" if self.transport == THREADS else "SIGKILL"

    def __str__(self) -> str:
        where = f"{self.schedule}-p{self.world_size}-{self.transport}-rank{self.rank}"
        return f"{where}-step{self.step}-{self.at}-{self.when}"


def pipeline(world: World, schedule: str) -> barepp.Pipeline:
    return barepp.Pipeline(
        world,
        barepp.mlp(LAYERS - 1, 8, 8, 3),
        torch.nn.functional.cross_entropy,
        schedule=schedule,
        num_microbatches=MICROBATCHES,
    )


def train(world: World, schedule: str) -> None:
    """What every rank does."""
    pipe = pipeline(world, schedule)
    for _ in range(STEPS):
        pipe.step(torch.ones(2 * MICROBATCHES, 8), torch.zeros(2 * MICROBATCHES, dtype=torch.int64))


@cache
def order(schedule: str, world_size: int) -> Order:
    """Return what each rank does in a step, as the pipeline itself has it."""

    def ask(world: World) -> Order:
        return pipeline(world, schedule).schedule.order

    [first, *_] = barepp.run(ask, world_size, transport=THREADS)
    return first


def transports() -> list[str]:
    """Return every transport that this machine can use, by the names that `--transport` takes."""
    return [name for name in transport_names() if name != "auto" and _usable(name)]


def _usable(name: str) -> bool:
    try:
        transport_class(name)
    except UnknownTransport:
        return False
    return True


def cases() -> list[Case]:
    """Return the whole matrix. Steps take turns: in the first one connections are being opened."""
    return [
        Case(schedule, world_size, transport, rank, index % STEPS, str(action), when)
        for schedule in barepp.schedule_names()
        for world_size in WORLD_SIZES
        for transport in transports()
        for rank, actions in enumerate(order(schedule, world_size))
        for index, action in enumerate(actions)
        for when in WHEN
    ]


def sample(count: int, seed: int) -> list[Case]:
    """Return `count` cases, about as many of each schedule over each transport."""
    generator = random.Random(seed)
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases():
        groups[case.schedule, case.transport].append(case)
    for group in groups.values():
        generator.shuffle(group)
    rows = list(groups.values())
    generator.shuffle(rows)
    in_turn = [case for turn in zip_longest(*rows) for case in turn if case is not None]
    return in_turn[:count]
