"""`barepp.init()`: how this process gets into its world, alone or as one rank of a job.

There is one world at a time per process: the worker process says which (`enlist`), `init` joins it.
Ranks that are threads of one process are handed theirs as an argument, and never come here.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Final

import torch

from barepp.assignment import Membership
from barepp.errors import UsageError
from barepp.warm import keep_freed_memory
from barepp.world import World
from transport.addresses import Address
from transport.control import ControlClient
from transport.errors import Failure, JobFailed
from transport.inproc import InprocHub, InprocTransport
from transport.registry import transport_class
from transport.tcp import TcpTransport

if TYPE_CHECKING:
    from barepp.probe import Probe

LOST_GRACE_S: Final = 0.5  # how long a rank waits for the launcher's word on a peer that vanished


def connect(membership: Membership) -> ControlClient:
    """Open the control connection and claim the rank."""
    return ControlClient(membership.rendezvous, membership.secret, membership.rank)


def _join(membership: Membership, control: ControlClient, probe: Probe | None) -> World:
    """Open the listening sockets, meet the others and return the world."""
    chosen = transport_class(membership.transport)
    if membership.world_size == 1:  # nobody to talk to: no sockets
        control.join(1, Address("", "", ("", 0)))
        alone = World(InprocTransport(InprocHub(1), 0), control, probe=probe)
        _beat(control, alone)
        return alone
    if not issubclass(chosen, TcpTransport):
        raise UsageError(f"transport {membership.transport!r} does not connect processes")
    sockets, address = chosen.listen()
    try:
        addresses = control.join(membership.world_size, address)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    transport = chosen(
        control.rank,
        membership.world_size,
        addresses,
        sockets,
        membership.secret,
        lost_grace_s=LOST_GRACE_S,
        checksum=membership.checksum,
    )
    world = World(transport, control, probe=probe)
    _beat(control, world)

    def on_failure(failure: Failure) -> None:
        if not world.left:
            doing = world.position()
            control.say_doing(doing)
            transport.abort(JobFailed(failure, doing))

    control.on_failure(on_failure)
    return world


def _beat(control: ControlClient, world: World) -> None:
    def state() -> dict[str, object] | None:
        beat = world.beat()
        return None if beat is None else beat.to_record()

    control.beat_with(state)


@dataclasses.dataclass
class _Process:
    """The one piece of process state: what `init` needs to know. The worker fills it in."""

    membership: Membership | None = None
    control: ControlClient | None = None
    probe: Probe | None = None
    world: World | None = None


_process = _Process()


def enlist(membership: Membership, control: ControlClient, probe: Probe | None = None) -> None:
    """Tell `init` which world this process belongs to; called once, by the worker process."""
    _process.membership, _process.control, _process.probe = membership, control, probe


def disown() -> None:
    """Make this process, a forked child of a rank, one that belongs to no world."""
    if _process.control is not None:
        _process.control.disown()
    _process.membership = _process.control = _process.world = None


def current_world() -> World | None:
    """Return the world that `init` made in this process and that was not left in order."""
    world = _process.world
    return None if world is None or world.left else world


def one_compute_thread() -> None:
    """Let torch compute with one thread in the calling thread, unless OMP_NUM_THREADS is set.

    Every thread that computes has to call it. MKL and OpenMP count threads for each calling thread
    apart, and torch tells them its number only at the first call that asks for it; a matrix product
    before that uses all cores, and rounds differently.
    """
    torch.set_num_threads(torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1)


def _refuse_foreign_launchers() -> None:
    """Each of their processes would train a model of its own, and nobody would notice."""
    for variable, who in (("WORLD_SIZE", "torchrun"), ("SLURM_NTASKS", "Slurm's srun")):
        size = os.environ.get(variable, "1")
        if size.isdecimal() and int(size) > 1:
            raise UsageError(
                f"{variable}={size}: it seems that {who} has started this process, which barepp "
                "does not support yet; use python -m barepp.launch"
            )


def init() -> World:
    """Join the world that this process was started in; blocks until all ranks have come.

    Started by `python -m barepp.launch` the process is one rank of many; started by itself it is
    a world of one rank. PyTorch's compute threads are set to one, unless OMP_NUM_THREADS is set:
    more would make ranks fight for cores, and one thread is what makes results bit-identical.
    Memory that is freed stays in the process (see warm.py).

    Raises:
        UsageError: this process is in a world already, or another launcher has started it.
        RendezvousError: another world size, or a rank that did not come in time.
        JobFailed: another rank failed meanwhile.
    """
    if current_world() is not None:
        raise UsageError("this process is in a world already: leave it before the next init()")
    one_compute_thread()
    keep_freed_memory()
    if _process.membership is None or _process.control is None:
        _refuse_foreign_launchers()
        _process.world = World(InprocTransport(InprocHub(1), 0))
    else:
        _process.world = _join(_process.membership, _process.control, _process.probe)
    return _process.world
