"""The one piece of process state: which world this process belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from barepp.worker.faults.fault_hook import FaultHook
    from barepp.worker.spec import Membership
    from barepp.worker.world import World
    from transport.errors import JobFailed
    from transport.rendezvous.client import ControlClient


@dataclasses.dataclass
class ProcessState:
    """What `init` needs to know; the worker process fills it in before the script runs.

    Attributes:
        fault_hook, on_told: for a test of failures: lets this rank fail, and is called with the
            error when this rank leaves its script because of another rank's failure.
    """

    membership: Membership | None = None
    control: ControlClient | None = None
    world: World | None = None
    fault_hook: FaultHook | None = None
    on_told: Callable[[JobFailed], None] | None = None


process = ProcessState()


def disown() -> None:
    """Make this process, a forked child of a rank, one that belongs to no world."""
    if process.control is not None:
        process.control.disown()
    process.membership = process.control = process.world = None


def current_world() -> World | None:
    """Return the world that `init` made in this process and that was not left in order."""
    world = process.world
    return None if world is None or world.left else world


def position() -> str:
    """Return what this process's rank does now, for example "computing 2F3"; "" when unknown."""
    world = current_world()
    return "" if world is None else world.position()


def leave_world_left_open() -> None:
    """Leave the world of a script that called init() without `with`, and ended well."""
    world = current_world()
    if world is not None:
        world.close()
