"""What one rank knows of the job: who it is, how it reaches the others, and how it leaves.

    with barepp.init() as world:
        world.send(torch.ones(3), dst=1)

1. Leaving the block normally is collective: flush, wait for all, say goodbye.
2. Leaving it by an exception is this rank's failure and is reported before anything is torn down.
3. There is one world at a time per process through `init`; over inproc the world is an argument.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch

from barepp.assignment import Membership
from barepp.errors import UsageError
from barepp.failures import failure_of
from transport.collectives import barrier as barrier_over_messages
from transport.control import ControlClient
from transport.errors import Failure, JobFailed, TransportClosed
from transport.inproc import InprocHub, InprocTransport
from transport.registry import transport_class
from transport.tcp import TcpTransport

if TYPE_CHECKING:
    from transport.contract import Transport, Work
    from transport.tensors import Message, TensorSpec

LOST_GRACE_S = 0.5  # how long a rank waits for the launcher's word on a peer that vanished
LEAVE_TIMEOUT_S = 300.0


class Control(Protocol):
    """The line to whoever is the authority on failures: the launcher, or the in-process runner."""

    def barrier(self, timeout: float | None = None) -> None:
        """Block until every rank of the world has called."""

    def report(self, failure: Failure) -> None:
        """Tell that this rank failed; never raises."""

    def close(self, *, goodbye: bool = True) -> None:
        """Hang up."""


class World:
    """One rank's view of the job; made by `barepp.init` or handed over by `barepp.run`.

    Attributes:
        rank, world_size: who this is.
        transport: the point-to-point contract below the methods of this class.
        random_lock: held around whatever draws random numbers when ranks are threads of one
            process (torch's generator is the process's); None when the process has one rank.
        activity: what the rank is about, for error messages; the executor keeps it.
    """

    def __init__(
        self,
        transport: Transport,
        control: Control | None = None,
        random_lock: threading.Lock | None = None,
    ) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.world_size = transport.world_size
        self.random_lock = random_lock
        self.activity: tuple[object, ...] = ()
        self._control = control
        self._left = False

    def position(self) -> str:
        """Return what this rank is about, for example "computing 2F3"; empty when unknown."""
        return " ".join(map(str, self.activity))

    def isend(self, message: Message, dst: int, tag: int = 0) -> Work:
        """Start to send; see `transport.contract.Transport.isend`. Tags are 0 ... 2**62 - 1."""
        return self.transport.isend(message, dst, _user_tag(tag))

    def irecv(
        self,
        src: int,
        tag: int = 0,
        *,
        into: Message | None = None,
        expect: TensorSpec | None = None,
    ) -> Work:
        """Start to receive; see `transport.contract.Transport.irecv`."""
        return self.transport.irecv(src, _user_tag(tag), into=into, expect=expect)

    def send(
        self, message: Message, dst: int, tag: int = 0, *, timeout: float | None = None
    ) -> None:
        """Send and block until the tensor may be written again; `timeout` is in seconds."""
        self.transport.send(message, dst, _user_tag(tag), timeout=timeout)

    def recv(
        self,
        src: int,
        tag: int = 0,
        *,
        into: torch.Tensor | None = None,
        expect: TensorSpec | None = None,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """Block until one tensor of `src` with `tag` is here; `timeout` is in seconds."""
        return self.transport.recv(src, _user_tag(tag), into=into, expect=expect, timeout=timeout)

    def barrier(self, timeout: float | None = None) -> None:
        """Block until every rank has called; `timeout` is in seconds.

        Raises:
            JobFailed: some rank failed and cannot come any more.
            WaitTimeout: the seconds are over.
        """
        if self.world_size == 1:
            return
        if self._control is not None:
            self._control.barrier(timeout)
        else:
            barrier_over_messages(self.transport, timeout=timeout)

    def close(self, timeout: float | None = LEAVE_TIMEOUT_S) -> None:
        """Leave: send what is queued, wait for all ranks, say goodbye. A second call does nothing.

        Raises:
            JobFailed: some rank failed before all had left.
        """
        if self._left:
            return
        self._left = True
        self.activity = ("leaving the world",)
        self.barrier(timeout)
        self.transport.close(timeout)
        if self._control is not None:
            self._control.close()
        _forget(self)

    def abandon(self, error: BaseException) -> None:
        """Leave because of an exception: report it, unless it only repeats another rank's."""
        if self._left:
            return
        self._left = True
        if self._control is None:
            self.transport.abort(TransportClosed(f"this rank failed: {error!r}"))
        elif not isinstance(error, JobFailed):
            # The connections stay open: a peer that saw them end first would not know why.
            self._control.report(failure_of(self.rank, error, self.position()))
        _forget(self)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon(error)


def _user_tag(tag: int) -> int:
    if type(tag) is not int or tag < 0:
        raise UsageError(f"a tag is an integer from 0 to 2**62 - 1, not {tag!r}")
    return tag


def connect(membership: Membership) -> ControlClient:
    """Open the control connection and claim the rank."""
    return ControlClient(membership.rendezvous, membership.secret, membership.rank)


def _join(membership: Membership, control: ControlClient) -> World:
    """Open the listening sockets, meet the others and return the world."""
    chosen = transport_class(membership.transport)
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
    )
    world = World(transport, control)

    def on_failure(failure: Failure) -> None:
        control.say_doing(world.position())
        transport.abort(JobFailed(failure))

    control.on_failure(on_failure)
    return world


@dataclasses.dataclass
class _Process:
    """The one piece of process state: what `init` needs to know. The worker fills it in."""

    membership: Membership | None = None
    control: ControlClient | None = None
    world: World | None = None


_process = _Process()


def enlist(membership: Membership, control: ControlClient) -> None:
    """Tell `init` which world this process belongs to; called once, by the worker process."""
    _process.membership, _process.control = membership, control


def current_world() -> World | None:
    """Return the world that `init` made in this process and that has not been left."""
    return _process.world


def one_compute_thread() -> None:
    """Let torch compute with one thread in the calling thread, unless OMP_NUM_THREADS is set.

    Every thread that computes has to call it. MKL and OpenMP count threads for each calling thread
    apart, and torch tells them its number only at the first call that asks for it; a matrix product
    before that uses all cores, and rounds differently.
    """
    torch.set_num_threads(torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1)


def init() -> World:
    """Join the world that this process was started in; blocks until all ranks have come.

    Started by `python -m barepp.launch` the process is one rank of many; started by itself it is
    a world of one rank. PyTorch's compute threads are set to one, unless OMP_NUM_THREADS is set:
    more would make ranks fight for cores, and one thread is what makes results bit-identical.

    Raises:
        UsageError: this process is in a world already.
        RendezvousError: another world size, or a rank that did not come in time.
        JobFailed: another rank failed meanwhile.
    """
    if _process.world is not None:
        raise UsageError("this process is in a world already: leave it before the next init()")
    one_compute_thread()
    if _process.membership is None or _process.control is None:
        _process.world = World(InprocTransport(InprocHub(1), 0))
    else:
        _process.world = _join(_process.membership, _process.control)
    return _process.world


def _forget(world: World) -> None:
    if _process.world is world:
        _process.world = None
