"""Answers whoever asks about a running job; a part of the launcher's loop, which it never holds up.

    question      answer, then {"record": "end"}
    status        job, then rank for each rank of this launcher (see status.py)
    stacks        graph {text}, then stack {rank, text} for each, when all have told or cannot

It reads what the launcher knows and changes nothing. With the job's first failure it closes: from
then on the launcher's own report is what there is to say, and the pipes of stacks are its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from barepp.launch.job_state import JobState
from barepp.launch.output import Output
from barepp.launch.processes.rank_process import Rank, stack_pipes
from barepp.monitor.stacks import POLL_S, StackRound, where_all_are
from barepp.monitor.status import JobStatus, RankStatus
from barepp.monitor.status_socket import Caller, StatusSocket
from barepp.worker.heartbeat import AT_BARRIER, IN_SCRIPT, Heartbeat
from transport.errors import printable, signal_name

TASK_LIMIT: Final = 1000  # characters


class StatusServer:
    """Speaks for the job of which it is given the launcher's knowledge, once it is open."""

    def __init__(self, task: str, job: JobState, ranks: Sequence[Rank], output: Output) -> None:
        self._task = " ".join(printable(task, TASK_LIMIT).split())  # one line
        self._options, self._loop, self._watch = job.options, job.loop, job.watch
        self._ranks = ranks
        self._output = output
        self._began = time.monotonic()
        self._socket: StatusSocket | None = None
        self._closed = False
        self._round: StackRound | None = None
        self._takers: list[Callable[[], None]] = []  # who waits for the round to be over

    def open(self) -> None:
        """Let others in."""
        if self._closed:
            return
        with contextlib.suppress(OSError):  # no descriptor, or a sandbox: then nobody watches
            self._socket = StatusSocket(self._loop, self._on_question)

    def close(self) -> None:
        """Close for good; whoever still waits for an answer finds the end."""
        self._closed, self._round = True, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def print_stacks(self) -> None:
        """Print every rank's stack when all have told it."""
        if not self._closed:
            self._ask_all(self._show_stacks)

    def _on_question(self, question: str, caller: Caller) -> None:
        match question:
            case "status":
                caller.answer(self._status())
            case "stacks":
                self._ask_all(lambda: self._tell_stacks(caller))
            case _:
                caller.answer([])

    # -- status -----------------------------------------------------------------------------------

    def _status(self) -> Iterator[dict[str, Any]]:
        now, options = time.monotonic(), self._options
        age_s = now - self._began
        job = JobStatus(os.getpid(), self._task, options.transport, options.world_size, age_s)
        yield {"record": "job", **job.to_record()}
        for rank in self._ranks:
            yield {"record": "rank", **self._rank_status(rank, now).to_record()}

    def _rank_status(self, rank: Rank, now: float) -> RankStatus:
        if rank.status is not None:
            return RankStatus(rank.rank, None, _end_of(rank.status), now - rank.ended_at)
        said = self._watch.said(rank.rank)
        if said is None:
            return RankStatus(rank.rank, rank.pid, "starting")
        silent_s = now - said.heard_at
        beat = said.beat
        if beat is None:
            state = "has left the world" if rank.left else "starting"
            return RankStatus(rank.rank, rank.pid, state, silent_s=silent_s)
        return RankStatus(
            rank.rank,
            rank.pid,
            state_of(beat),
            now - said.since,
            silent_s,
            beat.made_at,
            beat.steps,
            beat.microbatches,
            beat.sent_nbytes,
            beat.received_nbytes,
        )

    # -- stacks -----------------------------------------------------------------------------------

    def _ask_all(self, take: Callable[[], None]) -> None:
        """Let `take` be called when all ranks have told their stacks; one round serves all."""
        self._takers.append(take)
        if self._round is None:
            pipes, now = stack_pipes(self._ranks), time.monotonic()
            self._round = StackRound(pipes, now, self._watch.heard_at)
            self._advance()

    def _advance(self) -> None:
        """Take the stacks that have come; look again a moment later until all are here."""
        if self._round is None:
            return
        if not self._round.advance(time.monotonic()):
            self._loop.call_at(time.monotonic() + POLL_S, self._advance)
            return
        takers, self._takers = self._takers, []
        for take in takers:
            take()
        self._round = None

    def _tell_stacks(self, caller: Caller) -> None:
        assert self._round is not None and self._socket is not None
        stacks = sorted(self._round.told.items())
        told = ({"record": "stack", "rank": rank, "text": printable(text)} for rank, text in stacks)
        graph = self._watch.graph(now=time.monotonic())
        caller.answer([{"record": "graph", "text": graph}, *told])
        self._socket.send(caller)

    def _show_stacks(self) -> None:
        assert self._round is not None
        graph = self._watch.graph(now=time.monotonic())
        self._output.say(where_all_are(graph, self._round.told))


def _end_of(status: int) -> str:
    if status < 0:
        return f"was killed by {signal_name(-status)}"
    return f"ended with exit code {status}"


def state_of(beat: Heartbeat) -> str:
    """Return what a rank is about and for whom it waits: "waiting for the loss from rank 3"."""
    if beat.waits_for is None:
        return beat.doing or IN_SCRIPT
    doing = beat.doing or "waiting for a message"
    ranks = [str(rank) for rank in beat.waits_for if rank != AT_BARRIER]
    if not ranks or " rank " in doing:
        return doing
    return f"{doing} from rank {' and '.join(ranks)}"
