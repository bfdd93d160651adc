"""One job seen from its launcher: starts the ranks, hears who fails first, sees that all end.

The launcher is the only authority on the cause: the first failure in its clock is the cause, all
later ones are consequences. It learns of failures in three ways,

    a record on the control connection     an exception, told by the rank itself
    the end of the process                 a signal or an exit code
    the end of the control connection      neither of the above came

and for one death they come in this order, so it looks for them in this order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkServerContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Final

from barepp.assignment import Assignment, Call, Membership, Pipes, Script, be_rank
from barepp.events import EventLog
from barepp.failures import failure_of_exit
from transport.errors import Failure
from transport.handshake import new_secret
from transport.rendezvous import Event, EventKind, RendezvousServer

if TYPE_CHECKING:
    from barepp.output import Output

LOST_WAIT_S: Final = 0.25  # from the end of a control connection to the end of its process
_SIGNALLED: Final = object()  # marks the pipe that wakes the loop after a signal
PRELOAD: Final = ["barepp.worker", "barepp.pipeline", "torch._dynamo"]  # optimizers import the last


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job is run; times are in seconds."""

    world_size: int
    transport: str = "auto"
    grace_s: float = 0.5  # between the first failure and the end of who has not ended by itself
    join_timeout_s: float = 60.0


@dataclasses.dataclass
class Rank:
    """What the launcher knows of one rank."""

    rank: int
    process: BaseProcess
    result: Connection
    joined: bool = False
    left: bool = False
    lost_at: float | None = None
    exit_code: int | None = None
    doing: str = ""
    reported: Failure | None = None
    killed: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended: the first failure, if any, and what the launcher should exit with."""

    exit_code: int
    failure: Failure | None
    ranks: list[Rank]
    results: list[Any]


class Job:
    """Runs one task on all ranks; `run` blocks until every process has ended."""

    def __init__(
        self,
        task: Script | Call,
        options: Options,
        output: Output | None = None,
        events: EventLog | None = None,
        *,
        fork: bool = False,
    ) -> None:
        self._task = task
        self._options = options
        self._output = output
        self._events = events or EventLog(None)
        self._context: ForkContext | ForkServerContext = (
            multiprocessing.get_context("fork") if fork else _fork_server()
        )
        self._secret = new_secret()
        self._ranks: list[Rank] = []
        self._failure: Failure | None = None
        self._kill_at: float | None = None
        self._signal: int | None = None
        self._results: dict[int, Any] = {}

    def run(self) -> Outcome:
        """Start all ranks, wait for their end and return how it went."""
        self._server = RendezvousServer(
            self._options.world_size, self._secret, join_timeout_s=self._options.join_timeout_s
        )
        self._selector = selectors.DefaultSelector()
        try:
            with _signals_to(self._on_signal, self._selector):
                self._selector.register(self._server.fileno(), selectors.EVENT_READ)
                for rank in range(self._options.world_size):
                    self._start(rank)
                while any(member.exit_code is None for member in self._ranks):
                    self._turn()
        finally:
            for member in self._ranks:
                if member.exit_code is None:
                    member.process.kill()
                    member.process.join()
                member.result.close()
            self._server.close()
            self._selector.close()
        results = [self._results.get(member.rank) for member in self._ranks]
        return Outcome(self._exit_code(), self._failure, self._ranks, results)

    # -- starting ---------------------------------------------------------------------------------

    def _start(self, rank: int) -> None:
        context = self._context
        readers, writers = zip(*(context.Pipe(duplex=False) for _ in range(3)), strict=True)
        options = self._options
        membership = Membership(
            rank,
            options.world_size,
            self._server.address,
            self._secret,
            options.transport,
        )
        assignment = Assignment(membership, self._task, os.getpid())
        process = context.Process(
            target=be_rank, args=(assignment, Pipes(*writers)), name=f"barepp-rank-{rank}"
        )
        process.start()
        for writer in writers:
            writer.close()
        stdout, stderr, result = readers
        if self._output is not None:
            self._output.add_rank(rank, os.dup(stdout.fileno()), os.dup(stderr.fileno()))
        stdout.close()
        stderr.close()
        self._ranks.append(Rank(rank, process, result))
        self._selector.register(process.sentinel, selectors.EVENT_READ)
        self._selector.register(result, selectors.EVENT_READ, self._ranks[-1])
        self._events.write("started", rank, pid=process.pid)

    # -- the loop ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait until something happens, and act on all of it."""
        for key, _ in self._selector.select(self._seconds_to_deadline()):
            if isinstance(key.data, Rank):
                self._take_result(key.data)
            elif key.data is _SIGNALLED:
                os.read(key.fd, 64)
        if self._signal is not None and self._failure is None:
            name = signal.Signals(self._signal).name
            message = f"the launcher received {name}"
            self._fail(Failure(-1, "signal", message, signal=self._signal))
        for event in self._server.poll():
            self._on_event(event)
        for rank in self._ranks:
            if rank.exit_code is None and not rank.process.is_alive():
                self._on_exit(rank)
        self._check_deadlines()

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [self._server.next_deadline(), self._kill_at]
        deadlines += [r.lost_at + LOST_WAIT_S for r in self._ranks if r.lost_at is not None]
        left = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return None if left is None else max(0.0, left - time.monotonic())

    def _on_event(self, event: Event) -> None:
        if event.rank < 0:
            return
        rank = self._ranks[event.rank]
        match event.kind:
            case EventKind.JOINED:
                rank.joined = True
                self._check_early_leavers()
            case EventKind.LEFT:
                rank.left = True
            case EventKind.DOING:
                rank.doing = event.text
            case EventKind.FAILED:
                assert event.failure is not None
                rank.reported = event.failure
                self._fail(event.failure)
            case EventKind.LOST:
                rank.lost_at = time.monotonic()

    def _check_early_leavers(self) -> None:
        """A rank that ended without ever joining is missed as soon as another rank has joined."""
        if any(rank.joined for rank in self._ranks):
            for rank in self._ranks:
                if rank.exit_code is not None and not rank.joined:
                    self._fail(failure_of_exit(rank.rank, rank.exit_code))

    def _on_exit(self, rank: Rank) -> None:
        rank.process.join()
        code = rank.process.exitcode
        rank.exit_code = 1 if code is None else code
        rank.lost_at = None
        self._selector.unregister(rank.process.sentinel)
        self._events.write("ended", rank.rank, exit_code=rank.exit_code)
        if rank.exit_code != 0 or (rank.joined and not rank.left):
            if rank.reported is None and not rank.killed:
                self._fail(failure_of_exit(rank.rank, rank.exit_code, rank.doing))
        self._check_early_leavers()

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for rank in self._ranks:
            if rank.lost_at is not None and now >= rank.lost_at + LOST_WAIT_S:
                rank.lost_at = None
                if rank.exit_code is None:
                    message = "its control connection ended while its process lives on"
                    self._fail(Failure(rank.rank, "lost", message))
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            for rank in self._ranks:
                if rank.exit_code is None:
                    rank.killed = True
                    rank.process.kill()

    def _fail(self, failure: Failure) -> None:
        primary = self._failure is None
        record = {key: value for key, value in failure.to_record().items() if key != "rank"}
        if primary or self._ranks_own(failure):
            self._events.write("failed", failure.rank, primary=primary, **record)
        if not primary:
            return
        self._failure = failure
        self._kill_at = time.monotonic() + self._options.grace_s
        self._server.tell_failure(failure)

    def _ranks_own(self, failure: Failure) -> bool:
        """Whether a later failure is worth an event: not the mere end of a process told before."""
        return failure.cause not in ("exit", "signal")

    def _take_result(self, rank: Rank) -> None:
        self._selector.unregister(rank.result)
        with contextlib.suppress(EOFError, OSError):  # it ended without a result
            self._results[rank.rank] = pickle.loads(rank.result.recv_bytes())

    def _on_signal(self, number: int) -> None:
        if self._signal is not None:  # a second Ctrl-C: do not wait for anyone
            for rank in self._ranks:
                rank.killed = True
                rank.process.kill()
        self._signal = number

    def _exit_code(self) -> int:
        failure = self._failure
        if failure is None:
            return 0
        if failure.signal is not None:
            return 128 + failure.signal
        if failure.cause == "hang":
            return 124
        return failure.exit_code or 1


def _fork_server() -> ForkServerContext:
    """Return the context whose server imports torch once, so that ranks start from there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def end_fork_server() -> None:
    """End the fork server now instead of at this process's end; nothing of the job stays behind.

    It would leave by itself when we do, but only after torch's teardown, up to a second later.
    """
    server: Any = forkserver._forkserver
    pid = getattr(server, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        server._stop()


@contextlib.contextmanager
def _signals_to(handle: Callable[[int], None], selector: selectors.BaseSelector) -> Iterator[None]:
    """Send SIGINT, SIGTERM and SIGHUP to `handle` and wake the selector, as far as we may."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)

    def on_signal(number: int, frame: object) -> None:
        handle(number)
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"!")

    previous = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals are not ours
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[number] = signal.signal(number, on_signal)
    selector.register(reader, selectors.EVENT_READ, _SIGNALLED)
    try:
        yield
    finally:
        selector.unregister(reader)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
