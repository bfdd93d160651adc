"""`barepp.init()`: how this process gets into its world, alone or as one rank of a job.

There is one world at a time per process: the worker process says which, and `init` joins it.
Ranks that are threads of one process are handed theirs as an argument, and never come here.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from typing import TYPE_CHECKING, Final

import torch

from barepp import cli
from barepp.errors import UsageError
from barepp.worker.devices import chosen_device, num_gpus, on_gpus, own_gpu
from barepp.worker.process import compute_in_turns, keep_freed_memory
from barepp.worker.process_state import current_world, process
from barepp.worker.world import World
from transport.errors import Failure, JobFailed
from transport.registry import transport_class

if TYPE_CHECKING:
    from barepp.worker.external.environment import Started
    from barepp.worker.faults.fault_hook import FaultHook
    from barepp.worker.spec import Membership
    from transport.rendezvous.client import ControlClient
    from transport.sockets.addresses import Address
    from transport.sockets.transport import TcpTransport

LOST_GRACE_S: Final = 0.5  # how long a rank waits for the launcher's word on a peer that vanished


def connect(membership: Membership) -> ControlClient:
    """Open the control connection to the launcher and claim the rank."""
    from transport.rendezvous.client import ControlClient

    where, secret, rank = membership.rendezvous, membership.secret, membership.rank
    if not membership.spread:
        return ControlClient(where, secret, rank)
    server, silence_s = ("the launcher of node 0", -1), membership.options.heartbeat_s
    return ControlClient(where, secret, rank, server=server, silence_s=silence_s)


def _join(membership: Membership, control: ControlClient, fault_hook: FaultHook | None) -> World:
    """Open the listening sockets, meet the others and return the world."""
    from transport.rendezvous.client import BEAT_S
    from transport.sockets.addresses import Address

    options, local_rank, spread = membership.options, membership.local_rank, membership.spread
    device, world_size = options.device, options.world_size
    if world_size == 1:  # nobody to talk to: no sockets
        control.join(1, Address("", "", ("", 0)))
        world = _alone(device, control, fault_hook, local_rank)
        _beat(control, world)
        return world
    found = num_gpus(device, control.rank)
    chosen = _connecting(options.transport, gpu=on_gpus(device, [found]))
    sockets, address = _listen(chosen, membership, control)
    address = dataclasses.replace(address, num_gpus=found)
    # These must be the same on all ranks for their results to fit together.
    versions = {"barepp": cli.__version__, "torch": str(torch.__version__), "on device": device}
    try:
        addresses = control.join(world_size, address, versions=versions)
        gpu = None
        if on_gpus(device, [each.num_gpus for each in addresses.values()]):
            gpu = own_gpu(local_rank, found)
        elif found:  # another rank finds none. (Every transport listens where this one does.)
            chosen = _connecting(options.transport)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    # Before the transport starts its thread, which is to be scheduled as this one.
    compute_in_turns(sum(each.host == address.host for each in addresses.values()))
    # On several hosts the launcher's word may not come, because the network is cut. Both
    # connections find that out after one limit, but the control connection counts from the next
    # sign of life, half a second later.
    transport = chosen(
        control.rank,
        world_size,
        addresses,
        sockets,
        membership.secret,
        silence_s=options.heartbeat_s if spread else 0.0,
        lost_grace_s=LOST_GRACE_S + (2 * BEAT_S if spread else 0.0),
        checksum=options.checksum,
        gpu=gpu,
    )
    world = World(transport, control, fault_hook=fault_hook, local_rank=local_rank)
    _beat(control, world)

    def on_failure(failure: Failure) -> None:
        if not world.left:
            doing = world.position()
            control.say_doing(doing)
            transport.abort(JobFailed(failure, doing))

    control.on_failure(on_failure)
    return world


def _alone(
    device: str,
    control: ControlClient | None = None,
    fault_hook: FaultHook | None = None,
    local_rank: int = 0,
) -> World:
    """Return a world of one."""
    from transport.inproc import InprocHub, InprocTransport

    found = num_gpus(device, 0)
    gpu = own_gpu(local_rank, found) if on_gpus(device, [found]) else None
    transport = InprocTransport(InprocHub(1), 0, gpu=gpu)
    return World(transport, control, fault_hook=fault_hook, local_rank=local_rank)


def _connecting(name: str, *, gpu: bool = False) -> type[TcpTransport]:
    from transport.sockets.transport import TcpTransport

    chosen = transport_class(name, gpu=gpu)
    if not issubclass(chosen, TcpTransport):
        raise UsageError(f"transport {chosen.name!r} does not connect processes")
    return chosen


def _listen(
    chosen: type[TcpTransport], membership: Membership, control: ControlClient
) -> tuple[list[socket.socket], Address]:
    """Listen where the other ranks can come: on loopback, unless some are on other hosts."""
    from transport.sockets.addresses import is_loopback

    host = "127.0.0.1"
    if membership.spread:
        host = membership.address or control.local_host
        if is_loopback(host) and not membership.address:
            host = ""  # the rendezvous is here as well: a rank that reached it will reach us
    try:
        return chosen.listen(host)
    except OSError as error:
        text = f"rank {control.rank} cannot listen at {host}: {error.strerror or error}"
        raise UsageError(text) from error


def _beat(control: ControlClient, world: World) -> None:
    control.beat_with(lambda: None if (beat := world.beat()) is None else beat.to_record())


def launched() -> bool:
    """Whether a launcher (ours, torchrun or srun) started this process as one rank of a job."""
    return process.membership is not None or _started_by_others() is not None


def _started_by_others() -> Started | None:
    from barepp.worker.external.environment import started_by_others

    return started_by_others(os.environ)


def one_compute_thread() -> None:
    """Let torch compute with one thread in the calling thread, unless OMP_NUM_THREADS is set.

    Every thread that computes has to call it. MKL and OpenMP count threads for each calling thread
    apart, and torch tells them its number only at the first call that asks for it; a matrix product
    before that uses all cores, and rounds differently.
    """
    torch.set_num_threads(torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1)


def init(device: str | None = None) -> World:
    """Join the world that this process was started in; blocks until all ranks have come.

    Started by `python -m barepp.launch`, by torchrun or by Slurm's srun the process is one rank of
    many (environment.py says how it is told); started by itself it is a world of one. PyTorch's
    compute threads are set to one, unless OMP_NUM_THREADS is set: more would make ranks fight for
    cores, and one thread is what makes results bit-identical.
    Memory that is freed stays in the process, and ranks that share cores are scheduled as a batch
    (see worker/process.py).

    `device` ("cpu", "cuda" or "auto") is for a process that is started by itself, which also asks
    BAREPP_DEVICE; a launcher has one for all ranks (devices.py). `World.device` is what came of it.

    Raises:
        UsageError: this process is in a world already, the environment makes no sense, or there is
            no such device, or the launcher has said another one.
        RendezvousError: another world size, or a rank that did not come in time.
        JobFailed: another rank failed meanwhile.
    """
    if current_world() is not None:
        raise UsageError("this process is in a world already: leave it before the next init()")
    one_compute_thread()
    keep_freed_memory()
    if process.control is None and (started := _started_by_others()) is not None:
        from barepp.worker.external.adopt import adopt

        process.membership, process.control = adopt(started, os.environ)
    membership, control = process.membership, process.control
    if membership is None or control is None:
        named = os.environ.get("BAREPP_DEVICE") if device is None else device
        process.world = _alone(chosen_device(named, "auto"))
    elif device is None or chosen_device(device, "auto") == membership.options.device:
        process.world = _join(membership, control, process.fault_hook)
    else:
        raise UsageError(
            f"this rank was started with device {membership.options.device}, not {device}: tell "
            f"the launcher (--device {device}, or BAREPP_DEVICE={device} where it is not ours)"
        )
    return process.world
