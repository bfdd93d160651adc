"""One job seen from its launcher: starts the ranks, hears who fails first, sees that all end.

The launcher is the only authority on the cause: the first failure in its clock is the cause, all
later ones are consequences. It learns of failures in three ways,

    a record on the control connection     an exception, told by the rank itself
    the end of the process                 a signal or an exit code
    the end of the control connection      neither of the above came

and judges by these rules:

1. A process that has ended is judged when its control connection has ended too, because the words
   that explain the end may still be on their way. They are, when the machine is loaded.
2. A rank that reports only that it lost another one is kept waiting for a moment: the other one's
   end is the cause, even if its consequence is heard of first.
3. Nothing here blocks but the wait for the next event, and that has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import time
from typing import Final

from barepp.assignment import Assignment, Call, Membership, PickledCall, Pipes, Task, be_rank
from barepp.beats import Beat
from barepp.errors import UsageError
from barepp.events import EventLog
from barepp.failures import failure_of_exit
from barepp.foresight import preloads
from barepp.member import Options, Outcome, Rank, ResultReader
from barepp.nursery import Nursery
from barepp.output import Output
from barepp.reception import Reception
from barepp.signals import signals_to
from barepp.stack_dump import StackPipe, process_state
from barepp.watch import Watch
from transport.errors import Failure
from transport.handshake import new_secret
from transport.rendezvous import Event, EventKind, RendezvousServer

LAST_WORDS_S: Final = 1.0  # from the end of a process to the end of its control connection
LOST_WAIT_S: Final = 2.0  # from the end of a control connection to the end of its process
SUSPICION_S: Final = 1.0  # from "rank 2 is lost to me" to somebody's better explanation


class _InterruptedError(Exception):
    """A signal came while the ranks were being started, which can take seconds."""


class Job:
    """Runs one task on all ranks; `run` blocks until every process has ended."""

    def __init__(
        self,
        task: Task,
        options: Options,
        output: Output,
        events: EventLog | None = None,
        *,
        fork: bool = False,
    ) -> None:
        self._preloads = [] if fork else preloads(task)
        if isinstance(task, Call) and not fork:
            task = PickledCall(pickle.dumps(task), task.name)
        self._task = task
        self._options = options
        self._output = output
        self._events = events or EventLog(None)
        self._fork = fork
        self._secret = new_secret()
        self._ranks: list[Rank] = []
        self._failure: Failure | None = None
        self._suspicion: tuple[Failure, float] | None = None
        self._kill_at: float | None = None
        self._signal: int | None = None
        self._starting = False
        limits = options.heartbeat_s, options.timeout_s
        ranks = range(options.world_size)
        self._watch = Watch(ranks, *limits, lambda rank: process_state(self._ranks[rank].pid))
        self._reception = Reception(task.name, options, self._ranks, self._watch, output)

    def run(self) -> Outcome:
        """Start all ranks, wait for their end and return how it went."""
        options = self._options
        with contextlib.ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            more = [signal.SIGQUIT] if options.stacks_on_quit else []
            wakeup = stack.enter_context(signals_to(self._on_signal, *more))
            self._server = RendezvousServer(
                options.world_size, self._secret, join_timeout_s=options.join_timeout_s
            )
            stack.callback(self._server.close)
            stack.callback(self._end_all)
            self._selector.register(wakeup, selectors.EVENT_READ, lambda: os.eventfd_read(wakeup))
            self._selector.register(self._server.fileno(), selectors.EVENT_READ, lambda: None)
            stack.callback(self._reception.close)
            if not self._fork:
                self._reception.open(self._selector)
            self._start_all(stack)
            if self._fork:  # not before: the ranks would inherit the door, and keep it open
                self._reception.open(self._selector)
            while any(rank.exit_code is None for rank in self._ranks):
                self._turn()
            if self._suspicion is not None and self._failure is None:
                self._fail(self._suspicion[0])
        return Outcome(self._failure, self._ranks, self._signal)

    # -- starting ---------------------------------------------------------------------------------

    def _start_all(self, stack: contextlib.ExitStack) -> None:
        self._nursery = Nursery(self._preloads, fork=self._fork)
        stack.callback(self._nursery.end)
        try:
            self._starting = True
            for rank in range(self._options.world_size if self._signal is None else 0):
                self._start(rank)
            self._nursery.remove_folder()
        except _InterruptedError:
            pass
        except OSError as error:
            text = f"rank {len(self._ranks)} cannot be started: {error.strerror or error}"
            raise UsageError(f"{text}; a smaller world may work") from error
        finally:
            self._starting = False
        self._fail_by_signal()

    def _start(self, number: int) -> None:
        nursery, options = self._nursery, self._options
        readers, writers = zip(*(nursery.context.Pipe(duplex=False) for _ in range(4)), strict=True)
        membership = Membership(
            number,
            options.world_size,
            self._server.address,
            self._secret,
            options.transport,
            options.checksum,
        )
        assignment = Assignment(membership, self._task, nursery.parent_pid, options.rehearsal)
        process = nursery.context.Process(
            target=be_rank, args=(assignment, Pipes(*writers)), name=f"barepp-rank-{number}"
        )
        nursery.start(process)
        assert process.pid is not None
        stdout, stderr, result, stacks = (os.dup(reader.fileno()) for reader in readers)
        for connection in (*readers, *writers):
            connection.close()
        ended_fd = nursery.end_descriptor(process)
        stack_pipe = StackPipe(stacks, process.pid)
        rank = Rank(number, process, ended_fd, ResultReader(result), stack_pipe, process.pid)
        self._ranks.append(rank)
        self._output.add_rank(number, stdout, stderr)
        self._selector.register(ended_fd, selectors.EVENT_READ, lambda: self._on_end(rank))
        self._selector.register(result, selectors.EVENT_READ, lambda: self._on_result(rank))
        self._events.write("started", number, pid=process.pid)

    # -- the loop ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait until something happens, and act on all of it."""
        for key, _ in self._selector.select(self._seconds_to_deadline()):
            key.data()
        self._fail_by_signal()
        for event in self._server.poll():
            if 0 <= event.rank < len(self._ranks):
                self._on_event(self._ranks[event.rank], event)
        for rank in self._ranks:
            if rank.status is not None and rank.exit_code is None:
                self._judge(rank, rank.status)
        self._check_deadlines()

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [self._server.next_deadline(), self._kill_at, self._reception.next_deadline()]
        if self._failure is None:
            deadlines.append(self._watch.next_deadline())
        if self._suspicion is not None and self._failure is None:
            deadlines.append(self._suspicion[1])
        for rank in self._ranks:
            if rank.status is not None and rank.exit_code is None:
                deadlines.append(rank.ended_at + LAST_WORDS_S)
            elif rank.lost_at is not None:
                deadlines.append(rank.lost_at + LOST_WAIT_S)
        left = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return None if left is None else max(0.0, left - time.monotonic())

    def _on_event(self, rank: Rank, event: Event) -> None:
        match event.kind:
            case EventKind.JOINED:
                rank.joined, rank.left = True, False
                self._check_missing()
            case EventKind.BEAT:
                self._watch.beat(rank.rank, Beat.from_record(event.state), time.monotonic())
            case EventKind.LEFT:
                rank.left = True
            case EventKind.DOING:
                rank.doing = rank.doing or event.text
            case EventKind.FAILED if event.failure is not None:
                self._fail(event.failure)
            case EventKind.REPORTED if event.failure is not None and rank.reported is None:
                rank.reported = event.failure
                if event.failure.cause != "lost" or self._failure is not None:
                    self._fail(event.failure)
                elif self._suspicion is None:
                    self._suspicion = event.failure, time.monotonic() + SUSPICION_S
            case EventKind.LOST:
                rank.lost_at = time.monotonic()

    def _on_end(self, rank: Rank) -> None:
        """The process has ended; what it had said may still be on its way."""
        self._selector.unregister(rank.ended_fd)
        rank.kill_started()
        rank.process.is_alive()  # (collects the exit code, and unlike `join` cannot wait)
        code = rank.process.exitcode
        rank.status = 1 if code is None else code
        rank.ended_at = time.monotonic()

    def _judge(self, rank: Rank, status: int) -> None:
        late = time.monotonic() >= rank.ended_at + LAST_WORDS_S
        if self._server.connected(rank.rank) and not late:
            return
        rank.exit_code, rank.lost_at = status, None
        heard = self._watch.ended(rank.rank, rank.ended_at)
        told = rank.reported is not None or rank.killed
        if not told and (status != 0 or (rank.joined and not rank.left)):
            if self._nursery.died():
                text = "the process that all ranks were started from has died"
                self._fail(Failure(-1, "lost", text))
            self._fail(failure_of_exit(rank.rank, status, rank.doing, heard=heard))
        self._events.write("ended", rank.rank, exit_code=status)
        self._check_missing()

    def _check_missing(self) -> None:
        """A rank that has ended will never join those that wait for it."""
        missing = self._server.missing() if self._server.joining() else []
        for number in missing:
            code = self._ranks[number].exit_code if number < len(self._ranks) else None
            if code is not None and self._failure is None:
                self._fail(failure_of_exit(number, code, joined=False))

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._suspicion is not None and self._failure is None and now >= self._suspicion[1]:
            self._fail(self._suspicion[0])
        hang = self._watch.check(now) if self._failure is None else None
        if hang is not None:
            for rank in self._ranks:
                rank.ask_for_stacks()
            self._fail(hang)
        for rank in self._ranks:
            if rank.lost_at is not None and now >= rank.lost_at + LOST_WAIT_S:
                rank.lost_at = None
                if rank.status is None:
                    message = "its control connection ended while its process lives on"
                    self._fail(Failure(rank.rank, "lost", message))
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._kill()
        self._reception.check()

    def _fail(self, failure: Failure) -> None:
        if self._failure is None:
            self._failure = failure
            self._reception.close()
            self._kill_at = time.monotonic() + self._options.grace_s
            self._server.tell_failure(failure)
            self._write_failure(failure, primary=True)
            if self._suspicion is not None and self._suspicion[0] is not failure:
                self._write_failure(self._suspicion[0], primary=False)
        elif failure.cause not in ("exit", "signal"):  # those are told by the event "ended"
            self._write_failure(failure, primary=False)

    def _write_failure(self, failure: Failure, *, primary: bool) -> None:
        record = {key: value for key, value in failure.to_record().items() if key != "rank"}
        self._events.write("failed", failure.rank, primary=primary, **record)

    # -- ending -----------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        """Take note of a signal; runs between any two instructions of the loop."""
        if number == signal.SIGQUIT:  # a question, and no end
            self._reception.stacks_wanted = True
            return
        again = self._signal is not None or self._failure is not None
        if self._signal is None:
            self._signal = number
        if again:  # a second Ctrl-C, or one while ranks are given their grace: wait for nobody
            self._kill()
        if self._starting:
            self._starting = False
            raise _InterruptedError

    def _fail_by_signal(self) -> None:
        if self._signal is not None and self._failure is None:
            message = f"the launcher received {signal.Signals(self._signal).name}"
            self._fail(Failure(-1, "signal", message, signal=self._signal))

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.kill()

    def _end_all(self) -> None:
        for rank in self._ranks:
            rank.let_go()

    def _on_result(self, rank: Rank) -> None:
        if not rank.result.read():
            self._selector.unregister(rank.result.fd)
