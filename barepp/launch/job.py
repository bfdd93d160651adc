"""One job seen from its launcher: starts the ranks, serves their referee, sees that all end.

The launcher is the only authority on the cause; how it finds that is in referee.py. Nothing here
blocks but the wait for the next event, with a deadline, and for the stacks of a job that hangs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from functools import partial
from typing import Final

from barepp.errors import UsageError
from barepp.launch.hang_detector import HangDetector
from barepp.launch.hosts.head import STACKS_S, Head
from barepp.launch.hosts.node_agent import NodeAgent
from barepp.launch.hosts.protocol import Nodes, share
from barepp.launch.job_state import JobState, Member
from barepp.launch.output import EventLog, Output
from barepp.launch.processes.fork_server import ForkServer, preloads
from barepp.launch.processes.rank_process import Outcome, Rank, ResultReader, stack_pipes
from barepp.launch.processes.signals import signals_to
from barepp.launch.referee import Hooks, Referee
from barepp.launch.status_server import StatusServer
from barepp.monitor.stacks import StackPipe, process_state, take_stacks
from barepp.worker.devices import check_forking
from barepp.worker.entry import be_rank
from barepp.worker.spec import (
    Assignment,
    Call,
    Membership,
    Options,
    PickledCall,
    Pipes,
    Task,
)
from transport.errors import Failure
from transport.rendezvous.client import BEAT_S
from transport.rendezvous.events import Event
from transport.rendezvous.loop import EventLoop
from transport.rendezvous.server import RendezvousServer
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
        self._fork = fork
        self._nodes = nodes
        self._secret = nodes.secret if nodes is not None else new_secret()
        self._ranks: list[Rank] = []
        self._signal: int | None = None
        self._stacks_wanted = False
        self._starting = False
        self._orphaned = False  # whether the process that all ranks were started from has died
        limits = options.heartbeat_s, options.timeout_s
        watch = HangDetector(range(options.world_size), *limits, self._state_of)
        self._loop = EventLoop()
        self._state = JobState(options, self._loop, watch, events or EventLog(None))
        self._status = StatusServer(task.name, self._state, self._ranks, output)
        self._referee: Referee | NodeAgent
        self._others: Head | NodeAgent | None = None  # the way to the other nodes

    def run(self) -> Outcome:
        """Start all ranks, wait for their end and return how it went."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._loop.close)
            self._meet_referee(stack)
            more = [signal.SIGQUIT] if self._options.stacks_on_quit else []
            stack.enter_context(signals_to(self._on_signal, *more))
            stack.callback(self._end_all)
            stack.callback(self._status.close)
            if not self._fork:
                self._status.open()
            self._start_all(stack)
            if self._fork:  # not before: the ranks would inherit its socket, and keep it open
                self._status.open()
            while any(rank.exit_code is None for rank in self._ranks) or not self._others_over():
                self._loop.turn()
                self._fail_by_signal()
                if self._stacks_wanted:
                    self._stacks_wanted = False
                    self._status.print_stacks()
            if self._others is not None:
                self._others.conclude()
            elif isinstance(self._referee, Referee):
                self._referee.conclude()
        elsewhere = tuple(m for m in self._state.members.values() if not isinstance(m, Rank))
        return Outcome(self._referee.failure, self._ranks, self._signal, elsewhere)

    def _meet_referee(self, stack: contextlib.ExitStack) -> None:
        """Make what decides which failure is the first, or the way to it on node 0."""
        state, nodes = self._state, self._nodes
        hooks = Hooks(self._before_told, self._explain)
        if nodes is not None and nodes.node != 0:
            self._rendezvous = nodes.host, nodes.port
            self._others = self._referee = NodeAgent(state, nodes, hooks)
            return
        if nodes is None:
            options = self._options
            server = RendezvousServer(
                options.world_size,
                self._secret,
                self._loop,
                self._take,
                join_timeout_s=options.join_timeout_s,
            )
            self._referee = Referee(state, server, hooks)
        else:
            ranks = range(len(self._share()), self._options.world_size)
            state.members.update({rank: Member(rank) for rank in ranks})
            self._others = head = Head(state, nodes, hooks)
            self._referee, server = head.referee, head.server
        stack.callback(server.close)
        self._rendezvous = server.address

    def _take(self, event: Event) -> None:
        assert isinstance(self._referee, Referee)
        self._referee.take(event)

    def _others_over(self) -> bool:
        return self._others is None or self._others.over()

    def _share(self) -> range:
        world_size, nodes = self._options.world_size, self._nodes
        return share(world_size, nodes.count, nodes.node) if nodes else range(world_size)

    # -- starting ---------------------------------------------------------------------------------

    def _start_all(self, stack: contextlib.ExitStack) -> None:
        try:
            self._fork_server = ForkServer(self._preloads, fork=self._fork)
            stack.callback(self._fork_server.end)
            self._starting = True
            for rank in self._share() if self._signal is None else ():
                self._start(rank)
            self._fork_server.remove_folder()
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
        fork_server = self._fork_server
        duplex = (True, False, False, False, False)  # in the order of `Pipes`
        pipes = [fork_server.context.Pipe(duplex=both) for both in duplex]
        readers, writers = zip(*pipes, strict=True)
        membership = Membership(
            number,
            self._options,
            self._rendezvous,
            self._secret,
            spread=self._nodes is not None,
            address=self._nodes.own_address() if self._nodes is not None else "",
            local_rank=number - self._share().start,
            alone_s=self._alone_s(),
        )
        assignment = Assignment(membership, self._task, fork_server.parent_pid)
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
        self._state.members[number] = rank
        if isinstance(self._others, NodeAgent):
            self._others.started(number, process.pid)
        self._output.add_rank(number, stdout, stderr)
        self._loop.register(ended_fd, partial(self._on_end, rank))
        self._loop.register(result, partial(self._on_result, rank))
        self._state.events.write("started", number, pid=process.pid)

    def _alone_s(self) -> float:
        """Return how long a rank may go on that has lost its control connection.

        Our own ranks have then lost us, so nobody else would end them. The ranks of another node
        have lost node 0, and their own launcher, which lives, gives them their grace.
        """
        here = self._nodes is None or self._nodes.node == 0
        return ALONE_S + (0.0 if here else FAR_GRACE_S + self._options.grace_s)

    # -- the loop ---------------------------------------------------------------------------------

    def _before_told(self, failure: Failure) -> None:
        """The job has failed: from now on its ranks have their grace to end."""
        self._status.close()
        if failure.cause == "hang":  # before the news of it unwinds the stacks
            told = take_stacks(stack_pipes(self._ranks))
            for rank in self._ranks:
                rank.stacks = told[rank.rank]
        grace_s = self._options.grace_s
        if self._nodes is not None:
            grace_s += {"hang": STACKS_S, "lost": FAR_GRACE_S}.get(failure.cause, 0.0)
        self._loop.call_at(time.monotonic() + grace_s, self._kill)

    def _state_of(self, rank: int) -> str:
        member = self._state.members[rank]
        return process_state(member.pid) if isinstance(member, Rank) else ""

    def _explain(self) -> Failure | None:
        """Return why ranks end that say nothing themselves, if it is not their own doing."""
        if not self._orphaned:
            return None
        return Failure(-1, "lost", "the process that all ranks were started from has died")

    def _on_end(self, rank: Rank) -> None:
        """The process has ended; what it had said may still be on its way."""
        self._loop.unregister(rank.ended_fd)
        rank.kill_started()
        self._orphaned = self._orphaned or self._fork_server.tells_nothing(rank.ended_fd)
        rank.result.read()
        rank.cut_off = rank.result.cut_off()
        rank.process.is_alive()  # (collects the exit code, and unlike `join` cannot wait)
        code = rank.process.exitcode
        self._referee.ended(rank.rank, 1 if code is None else code)

    # -- ending -----------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        """Take note of a signal; runs between any two instructions of the loop."""
        self._loop.wake()
        if number == signal.SIGQUIT:  # a question, and no end
            self._stacks_wanted = True
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
            self._loop.unregister(rank.result.fd)
