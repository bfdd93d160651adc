"""The one piece of process state: which world this process belongs to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from barepp.worker.spec import Membership
from barepp.worker.world import World
from transport.rendezvous.client import ControlClient

if TYPE_CHECKING:
    from barepp.worker.faults.fault_hook import FaultHook


@dataclasses.dataclass
class _Process:
    """The one piece of process state: what `init` needs to know. The worker fills it in."""

    membership: Membership | None = None
    control: ControlClient | None = None
    fault_hook: FaultHook | None = None
    world: World | None = None


_process = _Process()


def enlist(
    membership: Membership, control: ControlClient, fault_hook: FaultHook | None = None
) -> None:
    """Tell `init` which world this process belongs to; called once, by the worker process."""
    _process.membership, _process.control, _process.fault_hook = membership, control, fault_hook


def disown() -> None:
    """Make this process, a forked child of a rank, one that belongs to no world."""
    if _process.control is not None:
        _process.control.disown()
    _process.membership = _process.control = _process.world = None


def current_world() -> World | None:
    """Return the world that `init` made in this process and that was not left in order."""
    world = _process.world
    return None if world is None or world.left else world
