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
import selectors
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from barepp.launch.hang_detector import HangDetector
from barepp.launch.output import Output
from barepp.launch.processes.rank_process import Rank, stack_pipes
from barepp.monitor.stacks import POLL_S, StackRound, where_all_are
from barepp.monitor.status import JobStatus, RankStatus
from barepp.monitor.status_socket import Caller, StatusSocket
from barepp.worker.heartbeat import AT_BARRIER, IN_SCRIPT, Heartbeat
from barepp.worker.spec import Options
from transport.errors import printable, signal_name

TASK_LIMIT: Final = 1000  # characters


class StatusServer:
    """Speaks for the job of which it is given the launcher's knowledge; `open` it, then serve.

    `stacks_wanted` may be set at any time, by a signal's handler too: then the launcher prints
    every rank's stack.
    """

    def __init__(
        self,
        task: str,
        options: Options,
        ranks: Sequence[Rank],
        watch: HangDetector,
        output: Output,
    ) -> None:
        self.stacks_wanted = False
        self._task = " ".join(printable(task, TASK_LIMIT).split())  # one line
        self._options = options
        self._ranks = ranks
        self._watch = watch
        self._output = output
        self._began = time.monotonic()
        self._door: StatusSocket | None = None
        self._selector: selectors.BaseSelector
        self._closed = False
        self._round: StackRound | None = None
        self._takers: list[Callable[[], None]] = []  # who waits for the round to be over

    def open(self, selector: selectors.BaseSelector) -> None:
        """Open the door, and have it served by the loop that owns the selector."""
        if self._closed:
            return
        with contextlib.suppress(OSError):  # no descriptor, or a sandbox: then nobody watches
            self._door, self._selector = StatusSocket(self._on_question), selector
            selector.register(self._door.fileno(), selectors.EVENT_READ, self._serve)

    def close(self) -> None:
        """Close the door for good; whoever still waits for an answer finds the end."""
        self._closed, self._round = True, None
        if self._door is not None:
            self._selector.unregister(self._door.fileno())
            self._door.close()
            self._door = None

    def next_deadline(self) -> float | None:
        """Return the `time.monotonic()` at which `check` should be called at the latest."""
        return None if self._round is None else time.monotonic() + POLL_S

    def check(self) -> None:
        """Do what is due."""
        if self._closed:
            return
        if self.stacks_wanted:
            self.stacks_wanted = False
            self._ask_all(self._print_stacks)
        if self._round is not None and self._round.advance(time.monotonic()):
            takers, self._takers = self._takers, []
            for take in takers:
                take()
            self._round = None

    def _serve(self) -> None:
        if self._door is not None:
            self._door.serve()

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

    def _tell_stacks(self, caller: Caller) -> None:
        assert self._round is not None and self._door is not None
        stacks = sorted(self._round.told.items())
        told = ({"record": "stack", "rank": rank, "text": printable(text)} for rank, text in stacks)
        graph = self._watch.graph(now=time.monotonic())
        caller.answer([{"record": "graph", "text": graph}, *told])
        self._door.send(caller)

    def _print_stacks(self) -> None:
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
