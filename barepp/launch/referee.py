"""Decides what the first failure of a job is, and sees that every rank is told it.

It learns of failures in three ways,

    a record on the control connection     an exception, told by the rank itself
    the end of the process                 a signal or an exit code, told by who started it
    the end of the control connection      neither of the above came

takes the first one in its own clock as the cause, all later ones as consequences, and judges by
these rules:

1. A process that has ended is judged when its control connection has ended too, because the words
   that explain the end may still be on their way. They are, when the machine is loaded.
2. A rank that reports only that it lost another one is kept waiting for a moment: the other one's
   end is the cause, even if its consequence is heard of first.
3. Where nobody sees how a process ends, the end of its control connection is the end of the rank.
4. Nothing here blocks: the owner waits for `fileno()` or `next_deadline()`, then calls `poll`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Final

from barepp.launch.hang_detector import HangDetector
from barepp.launch.output import EventLog
from barepp.launch.processes.rank_process import Member
from barepp.worker.failures import failure_of_cut_off, failure_of_exit
from barepp.worker.heartbeat import Heartbeat
from transport.errors import Failure
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.server import RendezvousServer

LAST_WORDS_S: Final = 1.0  # from the end of a process to the end of its control connection
LOST_WAIT_S: Final = 2.0  # from the end of a control connection to the end of its process
SUSPICION_S: Final = 1.0  # from "rank 2 is lost to me" to somebody's better explanation


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the owner of a referee is called for, and asked.

    Attributes:
        before_told: called with the cause before any rank is told it.
        explain: asked when a process has ended and the rank had not said why; may know better.
    """

    before_told: Callable[[Failure], None] = lambda failure: None
    explain: Callable[[], Failure | None] = lambda: None


class Referee:
    """The authority on one job's failures; `failure` is the first cause, once there is one.

    Args:
        members: the ranks by number; their owner may start them one after the other.
        watch: finds a job that hangs.
        server: what the ranks speak to. It is the owner's, who closes it.
        events: the job's history.
        hooks: what the owner is called for.
        far: whether ranks are on other hosts, whose clocks say nothing here.
        witnessed: whether the owner sees how processes end, and calls `ended`.
    """

    def __init__(
        self,
        members: Mapping[int, Member],
        watch: HangDetector,
        server: RendezvousServer,
        events: EventLog,
        hooks: Hooks,
        *,
        far: bool = False,
        witnessed: bool = True,
    ) -> None:
        self.failure: Failure | None = None
        self._members = members
        self._server = server
        self._events = events
        self._hooks = hooks
        self._far, self._witnessed = far, witnessed
        self._suspicion: tuple[Failure, float] | None = None
        self._watch = watch

    def fileno(self) -> int:
        """Return the descriptor that is readable whenever `poll` has something to do."""
        return self._server.fileno()

    def next_deadline(self) -> float | None:
        """Return the `time.monotonic()` at which `poll` should be called at the latest."""
        deadlines = [self._server.next_deadline()]
        if self.failure is None:
            deadlines.append(self._watch.next_deadline())
        if self._suspicion is not None and self.failure is None:
            deadlines.append(self._suspicion[1])
        for member in self._members.values():
            if member.status is not None and member.exit_code is None:
                deadlines.append(member.ended_at + LAST_WORDS_S)
            elif member.lost_at is not None:
                deadlines.append(member.lost_at + LOST_WAIT_S)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def poll(self) -> None:
        """Take note of all that has happened, and act on it."""
        for event in self._server.poll():
            if event.rank in self._members:
                self._take(self._members[event.rank], event)
        for member in self._members.values():
            if member.status is not None and member.exit_code is None:
                self._judge(member, member.status)
        self._check_deadlines()

    def fail(self, failure: Failure) -> None:
        """Take a failure: as the cause, and tell everyone, if it is the first."""
        if self.failure is None:
            self.failure = failure
            self._hooks.before_told(failure)
            self._server.tell_failure(failure)
            self._write(failure, primary=True)
            if self._suspicion is not None and self._suspicion[0] is not failure:
                self._write(self._suspicion[0], primary=False)
        elif failure.cause not in ("exit", "signal"):  # those are told by the event "ended"
            self._write(failure, primary=False)

    def conclude(self) -> None:
        """All ranks have ended: what was only suspected is the cause, for want of a better one."""
        if self._suspicion is not None and self.failure is None:
            self.fail(self._suspicion[0])

    def over(self) -> bool:
        """Whether nobody but the owner's own processes is to be waited for."""
        return True

    def started(self, member: Member, pid: int) -> None:
        """Take note that a process has begun."""

    def ended(self, member: Member, status: int) -> None:
        """Take note that a process has ended; what it had said may still be on its way."""
        member.status, member.ended_at = status, time.monotonic()

    def _take(self, member: Member, event: Event) -> None:
        match event.kind:
            case EventKind.JOINED:
                member.joined, member.left = True, False
                self._check_missing()
            case EventKind.BEAT:
                beat, after = Heartbeat.from_record(event.state), event.after if self._far else None
                self._watch.beat(member.rank, beat, time.monotonic(), after=after)
            case EventKind.LEFT:
                member.left = True
            case EventKind.DOING:
                member.doing = member.doing or event.text
            case EventKind.FAILED if event.failure is not None:
                self.fail(event.failure)
            case EventKind.REPORTED if event.failure is not None and member.reported is None:
                member.reported = event.failure
                if event.failure.cause != "lost" or self.failure is not None:
                    self.fail(event.failure)
                elif self._suspicion is None:
                    self._suspicion = event.failure, time.monotonic() + SUSPICION_S
            case EventKind.LOST:
                self._lose(member)
            case EventKind.HUNG_UP if not self._witnessed:
                self._watch.ended(member.rank, time.monotonic())

    def _lose(self, member: Member) -> None:
        now = time.monotonic()
        if self._witnessed:
            member.lost_at = now
            return
        heard = self._watch.ended(member.rank, now)
        last = f" (last heard: {heard})" if heard else ""
        if member.reported is None:
            message = f"it is gone: its control connection ended without a goodbye{last}"
            if member.rank == 0:
                message = f"rank 0, which served the rendezvous, is gone{last}"
            self.fail(Failure(member.rank, "lost", message))

    def _judge(self, member: Member, status: int) -> None:
        late = time.monotonic() >= member.ended_at + LAST_WORDS_S
        if self._server.connected(member.rank) and not late:
            return
        member.exit_code, member.lost_at = status, None
        heard = self._watch.ended(member.rank, member.ended_at)
        told = member.reported is not None or member.killed
        if not told and (status != 0 or (member.joined and not member.left)):
            better = self._hooks.explain()
            if better is not None:
                self.fail(better)
            if member.cut_off is not None:
                self.fail(failure_of_cut_off(member.rank, member.cut_off))
            else:
                self.fail(failure_of_exit(member.rank, status, member.doing, heard=heard))
        self._events.write("ended", member.rank, exit_code=status)
        self._check_missing()

    def _check_missing(self) -> None:
        """A rank that has ended will never join those that wait for it."""
        missing = self._server.missing() if self._server.joining() else []
        for number in missing:
            code = self._members[number].exit_code if number in self._members else None
            if code is not None and self.failure is None:
                self.fail(failure_of_exit(number, code, joined=False))

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._suspicion is not None and self.failure is None and now >= self._suspicion[1]:
            self.fail(self._suspicion[0])
        hang = self._watch.check(now) if self.failure is None else None
        if hang is not None:
            self.fail(self._refined(hang))
        for member in self._members.values():
            if member.lost_at is not None and now >= member.lost_at + LOST_WAIT_S:
                member.lost_at = None
                if member.status is None:
                    message = "its control connection ended while its process lives on"
                    self.fail(Failure(member.rank, "lost", message))

    def _refined(self, hang: Failure) -> Failure:
        """Return a better name for a hang, if there is one."""
        return hang

    def _write(self, failure: Failure, *, primary: bool) -> None:
        record = {key: value for key, value in failure.to_record().items() if key != "rank"}
        self._events.write("failed", failure.rank, primary=primary, **record)
