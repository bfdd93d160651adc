"""What the launcher hands to a worker process; importable without torch, as the launcher is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


@dataclasses.dataclass(frozen=True)
class Membership:
    """How a process gets into its world."""

    rank: int
    world_size: int
    rendezvous: tuple[str, int]
    secret: bytes = dataclasses.field(repr=False)
    transport: str
    checksum: bool = False  # whether each payload carries a sum that its receiver checks


@dataclasses.dataclass(frozen=True)
class Script:
    """Run a script as `python script arguments...` would."""

    path: str
    arguments: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Call:
    """Call `function(world, *args)` and hand its result to the launcher."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class PickledCall:
    """A `Call` for a process that was not forked from this one.

    It is unpickled by the rank itself, so that a module that cannot be imported there is told as
    any other failure of the rank.
    """

    pickled: bytes


Task = Script | Call | PickledCall


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One rank's orders."""

    membership: Membership
    task: Task
    parent_pid: int  # 0 when nobody knows it


@dataclasses.dataclass(frozen=True)
class Pipes:
    """The writing ends that a worker gets from the launcher."""

    stdout: Connection
    stderr: Connection
    result: Connection
    stacks: Connection


def be_rank(assignment: Assignment, pipes: Pipes) -> None:
    """Enter a worker process: the target that multiprocessing is given."""
    from barepp.worker import main  # imports torch, which the fork server has done already

    main(assignment, pipes)
