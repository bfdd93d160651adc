"""One job seen from its launcher: starts the ranks, serves their referee, sees that all end.

The launcher is the only authority on the cause; how it finds that is in referee.py. Nothing here
blocks but the wait for the next event, with a deadline, and for the stacks of a job that hangs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import time
from typing import Final

from barepp.errors import UsageError
from barepp.launch.hang_detector import HangDetector
from barepp.launch.hosts.head_referee import STACKS_S, HeadReferee
from barepp.launch.hosts.node_agent import NodeAgent
from barepp.launch.hosts.protocol import Nodes, share
from barepp.launch.output import EventLog, Output
from barepp.launch.processes.fork_server import ForkServer, preloads
from barepp.launch.processes.rank_process import Member, Outcome, Rank, ResultReader, stack_pipes
from barepp.launch.processes.signals import signals_to
from barepp.launch.referee import Hooks, Referee
from barepp.launch.status_server import StatusServer
from barepp.monitor.stacks import StackPipe, process_state, take_stacks
from barepp.worker.devices import check_forking
from barepp.worker.spec import (
    Assignment,
    Call,
    Membership,
    Options,
    PickledCall,
    Pipes,
    Task,
    be_rank,
)
from transport.errors import Failure
from transport.rendezvous.client import BEAT_S
from transport.rendezvous.server import RendezvousServer
from transport.sockets.addresses import serve, serve_at
from transport.sockets.handshake import new_secret

ALONE_S: Final = 1.0  # from the end of the launcher to that of its ranks
FAR_GRACE_S: Final = 2 * BEAT_S  # ranks that lose node 0's host notice that by themselves


class _InterruptedError(Exception):
    """A signal came while the ranks were being started, which can take seconds."""


class Job:
    """Runs one task on all ranks; `run` blocks until every process has ended.

    With `nodes` it starts one node's share of them. Node 0's launcher is the authority then.
    """

    def __init__(
        self,
        task: Task,
        options: Options,
        output: Output,
        events: EventLog | None = None,
        *,
        fork: bool = False,
        nodes: Nodes | None = None,
    ) -> None:
        if fork:
            check_forking(options.device)
        self._preloads = [] if fork else preloads(task)
        if isinstance(task, Call) and not fork:
            task = PickledCall(pickle.dumps(task), task.name)
        self._task = task
        self._options = options
        self._output = output
        self._events = events or EventLog(None)
        self._fork = fork
        self._nodes = nodes
        self._secret = nodes.secret if nodes is not None else new_secret()
        self._ranks: list[Rank] = []
        self._members: dict[int, Member] = {}
        self._kill_at: float | None = None
        self._signal: int | None = None
        self._starting = False
        self._orphaned = False  # whether the process that all ranks were started from has died
        limits = options.heartbeat_s, options.timeout_s
        self._watch = HangDetector(range(options.world_size), *limits, self._state_of)
        self._reception = StatusServer(task.name, options, self._ranks, self._watch, output)

    def run(self) -> Outcome:
        """Start all ranks, wait for their end and return how it went."""
        with contextlib.ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            self._referee = self._new_referee(stack)
            more = [signal.SIGQUIT] if self._options.stacks_on_quit else []
            wakeup = stack.enter_context(signals_to(self._on_signal, *more))
            stack.callback(self._end_all)
            self._selector.register(wakeup, selectors.EVENT_READ, lambda: os.eventfd_read(wakeup))
            self._selector.register(self._referee.fileno(), selectors.EVENT_READ, lambda: None)
            stack.callback(self._reception.close)
            if not self._fork:
                self._reception.open(self._selector)
            self._start_all(stack)
            if self._fork:  # not before: the ranks would inherit the door, and keep it open
                self._reception.open(self._selector)
            while any(rank.exit_code is None for rank in self._ranks) or not self._referee.over():
                self._turn()
            self._referee.conclude()
        elsewhere = tuple(m for m in self._members.values() if not isinstance(m, Rank))
        return Outcome(self._referee.failure, self._ranks, self._signal, elsewhere)

    def _new_referee(self, stack: contextlib.ExitStack) -> Referee | NodeAgent:
        """Return who decides what the first failure is, or speaks to who does."""
        options, nodes, members = self._options, self._nodes, self._members
        world_size, timeout_s = options.world_size, options.join_timeout_s
        hooks = Hooks(self._before_told, self._explain)
        if nodes is not None and nodes.node != 0:
            self._rendezvous = nodes.host, nodes.port
            return NodeAgent(members, options, self._watch, self._events, hooks, nodes=nodes)
        if nodes is None:
            server = RendezvousServer(world_size, self._secret, join_timeout_s=timeout_s)
            stack.callback(server.close)
            self._rendezvous = server.address
            return Referee(members, self._watch, server, self._events, hooks)
        # Our own ranks come by loopback: they must be heard when the network is gone.
        doors = [serve("127.0.0.1"), serve_at(nodes.host, nodes.port)]
        server = RendezvousServer(
            world_size, self._secret, listening=doors, join_timeout_s=timeout_s, far=True
        )
        stack.callback(server.close)
        self._rendezvous = server.address
        mine = share(world_size, nodes.count, 0)
        members.update({rank: Member(rank) for rank in range(world_size) if rank not in mine})
        head = HeadReferee(members, self._watch, server, self._events, hooks)
        head.lead(options, nodes)
        return head

    def _share(self) -> range:
        world_size, nodes = self._options.world_size, self._nodes
        return share(world_size, nodes.count, nodes.node) if nodes else range(world_size)

    # -- starting ---------------------------------------------------------------------------------

    def _start_all(self, stack: contextlib.ExitStack) -> None:
        try:
            self._nursery = ForkServer(self._preloads, fork=self._fork)
            stack.callback(self._nursery.end)
            self._starting = True
            for rank in self._share() if self._signal is None else ():
                self._start(rank)
            self._nursery.remove_folder()
        except _InterruptedError:
            pass
        except OSError as error:
            number = self._share()[len(self._ranks)]
            where = f" on node {self._nodes.node}" if self._nodes is not None else ""
            text = f"rank {number} cannot be started{where}: {error.strerror or error}"
            if self._nodes is None:
                raise UsageError(f"{text}; a smaller world may work") from error
            self._referee.fail(Failure(-1, "rendezvous", text, exit_code=2))  # all nodes are told
        finally:
            self._starting = False
        self._fail_by_signal()

    def _start(self, number: int) -> None:
        fork_server, options = self._nursery, self._options
        duplex = (True, False, False, False, False)  # in the order of `Pipes`
        pipes = [fork_server.context.Pipe(duplex=both) for both in duplex]
        readers, writers = zip(*pipes, strict=True)
        membership = Membership(
            number,
            options.world_size,
            self._rendezvous,
            self._secret,
            options.transport,
            options.checksum,
            spread=self._nodes is not None,
            address=self._nodes.own_address() if self._nodes is not None else "",
            silence_s=options.heartbeat_s,
            alone_s=self._alone_s(),
            local_rank=number - self._share().start,
            device=options.device,
        )
        assignment = Assignment(membership, self._task, fork_server.parent_pid, options.fault_plan)
        process = fork_server.context.Process(
            target=be_rank,
            args=(assignment, Pipes(*writers)),
            name=f"barepp-rank-{number}",
        )
        fork_server.start(process)
        assert process.pid is not None
        kept = (os.dup(connection.fileno()) for connection in readers)
        asking, stdout, stderr, result, stacks = kept
        for connection in (*readers, *writers):
            connection.close()
        ended_fd = fork_server.end_descriptor(process)
        rank = Rank(
            number,
            process=process,
            ended_fd=ended_fd,
            result=ResultReader(result),
            stack_pipe=StackPipe(asking, stacks, process.pid),
            pid=process.pid,
        )
        self._ranks.append(rank)
        self._members[number] = rank
        self._referee.started(rank, process.pid)
        self._output.add_rank(number, stdout, stderr)
        self._selector.register(ended_fd, selectors.EVENT_READ, lambda: self._on_end(rank))
        self._selector.register(result, selectors.EVENT_READ, lambda: self._on_result(rank))
        self._events.write("started", number, pid=process.pid)

    def _alone_s(self) -> float:
        """Return how long a rank may go on that has lost its control connection.

        Our own ranks have then lost us, so nobody else would end them. The ranks of another node
        have lost node 0, and their own launcher, which lives, gives them their grace.
        """
        here = self._nodes is None or self._nodes.node == 0
        return ALONE_S + (0.0 if here else FAR_GRACE_S + self._options.grace_s)

    # -- the loop ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait until something happens, and act on all of it."""
        for key, _ in self._selector.select(self._seconds_to_deadline()):
            key.data()
        self._fail_by_signal()
        self._referee.poll()
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_at = None
            self._kill()
        self._reception.check()

    def _seconds_to_deadline(self) -> float | None:
        reception = self._reception.next_deadline()
        deadlines = (self._referee.next_deadline(), self._kill_at, reception)
        left = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return None if left is None else max(0.0, left - time.monotonic())

    def _before_told(self, failure: Failure) -> None:
        """The job has failed: from now on its ranks have their grace to end."""
        self._reception.close()
        if failure.cause == "hang":  # before the news of it unwinds the stacks
            told = take_stacks(stack_pipes(self._ranks))
            for rank in self._ranks:
                rank.stacks = told[rank.rank]
        self._kill_at = time.monotonic() + self._options.grace_s
        if self._nodes is not None:
            self._kill_at += {"hang": STACKS_S, "lost": FAR_GRACE_S}.get(failure.cause, 0.0)

    def _state_of(self, rank: int) -> str:
        member = self._members[rank]
        return process_state(member.pid) if isinstance(member, Rank) else ""

    def _explain(self) -> Failure | None:
        """Return why ranks end that say nothing themselves, if it is not their own doing."""
        if not self._orphaned:
            return None
        return Failure(-1, "lost", "the process that all ranks were started from has died")

    def _on_end(self, rank: Rank) -> None:
        """The process has ended; what it had said may still be on its way."""
        self._selector.unregister(rank.ended_fd)
        rank.kill_started()
        self._orphaned = self._orphaned or self._nursery.tells_nothing(rank.ended_fd)
        rank.result.read()
        rank.cut_off = rank.result.cut_off()
        rank.process.is_alive()  # (collects the exit code, and unlike `join` cannot wait)
        code = rank.process.exitcode
        self._referee.ended(rank, 1 if code is None else code)

    # -- ending -----------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        """Take note of a signal; runs between any two instructions of the loop."""
        if number == signal.SIGQUIT:  # a question, and no end
            self._reception.stacks_wanted = True
            return
        again = self._signal is not None or self._referee.failure is not None
        if self._signal is None:
            self._signal = number
        if again:  # a second Ctrl-C, or one while ranks are given their grace: wait for nobody
            self._kill()
        if self._starting:
            self._starting = False
            raise _InterruptedError

    def _fail_by_signal(self) -> None:
        if self._signal is not None and self._referee.failure is None:
            who = "the launcher" if self._nodes is None else f"node {self._nodes.node}'s launcher"
            message = f"{who} received {signal.Signals(self._signal).name}"
            self._referee.fail(Failure(-1, "signal", message, signal=self._signal))

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.kill()

    def _end_all(self) -> None:
        for rank in self._ranks:
            rank.let_go()

    def _on_result(self, rank: Rank) -> None:
        if not rank.result.read():
            self._selector.unregister(rank.result.fd)
