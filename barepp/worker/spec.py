"""What the launcher hands to a worker process; importable without torch, as the launcher is."""

from __future__ import annotations

import dataclasses
import pickle
import struct
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from barepp.worker.faults.kinds import Fault


@dataclasses.dataclass(frozen=True)
class Membership:
    """How a process gets into its world.

    Attributes:
        options: those of its job.
        rendezvous: the host and port where it is served.
        spread: whether the ranks are on several hosts: then they listen beyond loopback.
        address: where the other hosts reach this one; "" is where it reaches the rendezvous from.
        local_rank: its number among the ranks of its host.
        alone_s: how long a worker process goes on when its control connection has ended.
    """

    rank: int
    options: Options
    rendezvous: tuple[str, int]
    secret: bytes = dataclasses.field(repr=False)
    spread: bool
    address: str
    local_rank: int
    alone_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Script:
    """Run a script as `python script arguments...` would."""

    path: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called, for people."""
        return self.path


@dataclasses.dataclass(frozen=True)
class Call:
    """Call `function(world, *args)` and hand its result to the launcher."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """What it is called, for people."""
        return f"{getattr(self.function, '__qualname__', 'a function')}()"


@dataclasses.dataclass(frozen=True)
class PickledCall:
    """A `Call` for a process that was not forked from this one.

    It is unpickled by the rank itself, so that a module that cannot be imported there is told as
    any other failure of the rank.
    """

    pickled: bytes
    name: str


Task = Script | Call | PickledCall


def reaches_elsewhere(call: Call) -> bool:
    """Whether a process that was not forked from this one can be given the call."""
    module = sys.modules.get(getattr(call.function, "__module__", None) or "")
    if module is None or (module.__name__ == "__main__" and not hasattr(module, "__file__")):
        return False
    try:
        pickle.dumps(call)
    except Exception:  # whatever the arguments' own code raises
        return False
    return True


@dataclasses.dataclass(frozen=True)
class FaultPlan:
    """A job that is to fail, for a test: see testing/fault_run.py.

    Each rank writes into `folder`, as rank0.jsonl and so on, when its fault happened and when it
    raised what it was told.
    """

    fault: Fault
    folder: str


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One rank's orders."""

    membership: Membership
    task: Task
    parent_pid: int  # 0 when it is not known


@dataclasses.dataclass(frozen=True)
class Pipes:
    """What a worker gets of the launcher's pipes: it writes to all; `asked` brings questions."""

    asked: Connection
    stdout: Connection
    stderr: Connection
    result: Connection
    stacks: Connection


LENGTH: Final = struct.Struct("<Q")  # stands before a pickled result
CUT_OFF: Final = (1 << 64) - 1  # stands there when the text is what the rank was about instead
MAX_SECONDS: Final = 1e6  # eleven days; the operating system takes no timeout that is much longer


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job is run; times are in seconds."""

    world_size: int
    transport: str = "auto"
    grace_s: float = 0.5  # between the first failure and the kill of ranks that still run
    join_timeout_s: float = 60.0
    heartbeat_s: float = 10.0  # how long a rank, or a host, may give no sign of life; 0 for ever
    timeout_s: float = 300.0  # how long a job may wait while nothing moves; 0 for ever
    checksum: bool = False  # whether payloads carry a sum
    fault_plan: FaultPlan | None = None  # a test's wish: see fault_run.py
    device: str = "cpu"  # "cpu", "cuda" or "auto": see devices.py
    stacks_on_quit: bool = False  # whether SIGQUIT prints every rank's stack; for a launcher's own
