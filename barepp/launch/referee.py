"""Decides which failure of a job came first, and sees that every rank is told it.

This is the only place that decides it, for processes of this host and of others and for threads:

    worker/main.py, exits.py     an exception ends rank 2's script: report it, then exit
      └─ rendezvous/client.py      "failed", over the control connection
           └─ rendezvous/server.py   Event REPORTED ────────────────┐
    job.py                       rank 2's process has ended ──────┤
    hosts/head.py                another node's launcher says so, ├─> Referee ─ the first one counts
                                 or is gone                       │      ├─> job.py: stacks, grace
    hang_detector.py             the job hangs ───────────────────┤      ├─> every rank is told
    threads.py                   a thread raises, or all hang ────┘      └─> report.py

The first failure in the referee's own clock is the cause; all later ones are consequences.

    what is heard                                      what follows
 1  a rank reports an exception                        it has failed
 2  a rank reports only that it lost another one       it is suspected for SUSPICION_S: the other
                                                       one's end, heard meanwhile, is the cause
 3  a process has ended, but not its connection        wait LAST_WORDS_S for the words under way
 4  a process has ended, and its connection            it has failed; but not if this launcher
 killed it,
                                                       or left its world with exit code 0
 5  a rank has ended, and others wait for it to join   it has failed
 6  a connection has ended, but not its process        wait LOST_WAIT_S, then the rank is lost
 7  the same where nobody sees processes end           the rank is lost (torchrun, srun)
 8  no sign of life, a deadlock, no progress           the job hangs: see hang_detector.py
 9  8, and its launcher gives no sign either           that node is lost
10  a launcher is gone without a goodbye               that node is lost, and its ranks with it
11  all ranks here have ended, a launcher has never    the world cannot be put together
    come, and the join timeout is over
12  the launcher itself met a failure (a signal, …)    the job has failed, and no rank in particular

Rules 2 to 7 and 9 to 11 do not apply to threads: no report of theirs overtakes another, and they
end with their process. On another node than 0 a `NodeAgent` stands in the referee's place: it asks
node 0's, and acts on what it knows itself only when that one is gone or does not answer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from barepp.launch.job_state import Host, JobState, Member
from barepp.worker.failures import failure_of_cut_off, failure_of_exit
from transport.errors import Failure
from transport.rendezvous.events import Event, EventKind

LAST_WORDS_S: Final = 1.0  # from the end of a process to the end of its control connection
LOST_WAIT_S: Final = 2.0  # from the end of a control connection to the end of its process
SUSPICION_S: Final = 1.0  # from "rank 2 is lost to me" to somebody's better explanation


class Lines(Protocol):
    """The way to the ranks: the rendezvous, or what holds the threads."""

    def connected(self, rank: int) -> bool:
        """Whether more may be heard of the rank."""
        return False

    def awaited(self) -> list[int]:
        """Return the ranks that others wait for to join their world."""
        return []

    def tell_failure(self, failure: Failure) -> None:
        """Tell every rank the first failure."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the owner of a referee is called for, and asked.

    Attributes:
        before_told: called with the cause before any rank is told it.
        explain: asked when a process has ended and the rank had not said why; may know better.
        judged: called when a process has ended and all its words have been heard.
    """

    before_told: Callable[[Failure], None] = lambda failure: None
    explain: Callable[[], Failure | None] = lambda: None
    judged: Callable[[int], None] = lambda rank: None


NO_HOOKS: Final = Hooks()


class Referee:
    """The authority on one job's failures; `failure` is the first cause, once there is one.

    Args:
        job: what is known of it.
        lines: the way to the ranks.
        hooks: what the owner is called for.
        hosts: the other nodes by number, if there are any; their owner keeps them up to date.
        far: whether ranks are on other hosts, whose clocks say nothing here.
        witnessed: whether the owner sees how processes end, and calls `ended`.
    """

    def __init__(
        self,
        job: JobState,
        lines: Lines,
        hooks: Hooks = NO_HOOKS,
        *,
        hosts: Mapping[int, Host] | None = None,
        far: bool = False,
        witnessed: bool = True,
    ) -> None:
        self.failure: Failure | None = None
        self._job, self._loop, self._members = job, job.loop, job.members
        self._lines, self._hooks, self._hosts = lines, hooks, hosts or {}
        self._far, self._witnessed = far, witnessed
        self._suspicion: Failure | None = None

    # -- what is heard ----------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        """Take what a rank has said, or the end of its control connection."""
        if event.rank not in self._members:
            return
        member = self._members[event.rank]
        first_report = event.kind is EventKind.REPORTED and member.reported is None
        self._job.note(event, far=self._far)
        match event.kind:
            case EventKind.JOINED:
                self._check_awaited()
            case EventKind.BEAT:
                self.check_hang()
            case EventKind.FAILED if event.failure is not None:
                self.fail(event.failure)
            case EventKind.REPORTED if event.failure is not None and first_report:
                if event.failure.cause != "lost" or self.failure is not None:  # rule 1
                    self.fail(event.failure)
                elif self._suspicion is None:  # rule 2
                    self._suspicion = event.failure
                    self._loop.call_at(time.monotonic() + SUSPICION_S, self.conclude)
            case EventKind.LOST | EventKind.HUNG_UP:
                self._disconnected(member, in_order=event.kind is EventKind.HUNG_UP)

    def check_hang(self) -> None:
        """Look whether the job hangs, when all signs of life that are here have been taken."""
        self._loop.call_at(0.0, self._check_hang)

    def ended(self, rank: int, status: int) -> None:
        """Take note that a process has ended; what it had said may still be on its way."""
        member = self._job.ended(rank, status)
        late = member.ended_at + LAST_WORDS_S if self._lines.connected(rank) else 0.0  # rule 3
        self._loop.call_at(late, self._judge, rank)

    def host_lost(self, host: Host, how: str) -> None:
        """Take the end of another node's launcher, which said no goodbye; `how` is in words."""
        self.fail(_lost(host, how))  # rule 10

    def fail(self, failure: Failure) -> None:
        """Take a failure: as the cause, and tell everyone, if it is the first."""
        if self.failure is None:
            self.failure = failure = self._with_absent(failure)
            self._hooks.before_told(failure)
            self._lines.tell_failure(failure)
            self._job.write_failure(failure, primary=True)
            if self._suspicion is not None and self._suspicion is not failure:
                self._job.write_failure(self._suspicion, primary=False)
        elif failure.cause not in ("exit", "signal"):  # those are told by the event "ended"
            self._job.write_failure(failure, primary=False)

    def conclude(self) -> None:
        """Nothing more is heard: what was only suspected is the cause, for want of a better one."""
        if self._suspicion is not None and self.failure is None:
            self.fail(self._suspicion)

    # -- the rules --------------------------------------------------------------------------------

    def _disconnected(self, member: Member, *, in_order: bool) -> None:
        now, rank = time.monotonic(), member.rank
        if member.status is not None:
            self._loop.call_at(0.0, self._judge, rank)  # rule 4
        elif self._witnessed and not in_order:
            self._loop.call_at(now + LOST_WAIT_S, self._lost_alive, rank)  # rule 6
        elif not self._witnessed:
            heard = self._job.watch.ended(rank, now)
            if not in_order and member.reported is None:  # rule 7
                last = f" (last heard: {heard})" if heard else ""
                message = f"it is gone: its control connection ended without a goodbye{last}"
                if rank == 0:
                    message = f"rank 0, which served the rendezvous, is gone{last}"
                self.fail(Failure(rank, "lost", message))

    def _lost_alive(self, rank: int) -> None:
        if self._members[rank].status is None:
            message = "its control connection ended while its process lives on"
            self.fail(Failure(rank, "lost", message))

    def _judge(self, rank: int) -> None:
        """Say what the end of a process means, now that all its words have been heard: rule 4."""
        member = self._members[rank]
        if member.exit_code is not None:
            return
        status = member.exit_code = member.status
        assert status is not None
        heard = self._job.watch.ended(rank, member.ended_at)
        told = member.reported is not None or member.killed
        if not told and (status != 0 or (member.joined and not member.left)):
            better = self._hooks.explain()
            if better is not None:
                self.fail(better)
            if member.cut_off is not None:
                self.fail(failure_of_cut_off(rank, member.cut_off))
            else:
                self.fail(failure_of_exit(rank, status, member.doing, heard=heard))
        self._job.events.write("ended", rank, exit_code=status)
        self._hooks.judged(rank)
        self._check_awaited()
        self.await_hosts()

    def _check_awaited(self) -> None:
        """Find a rank that has ended, so that it will never join those that wait for it: rule 5."""
        for rank in self._lines.awaited():
            code = self._members[rank].exit_code if rank in self._members else None
            if code is not None and self.failure is None:
                self.fail(failure_of_exit(rank, code, joined=False))

    def _check_hang(self) -> None:
        if self.failure is not None:
            return
        now = time.monotonic()
        hang = self._job.watch.check(now)  # rule 8
        if hang is None:
            self._loop.call_at(self._job.watch.next_deadline(), self._check_hang)
            return
        # Rule 9: a launcher speaks twice a second, so half the limit is long.
        host = next((host for host in self._hosts.values() if hang.rank in host.ranks), None)
        silence_s = self._job.options.heartbeat_s
        if host is not None and host.come and now - host.heard_at >= max(1.0, silence_s / 2):
            hang = _lost(
                host, f"no sign of life from it or its ranks for {silence_s:g} s"
            )  # rule 9
        self.fail(hang)

    def await_hosts(self) -> None:
        """Wait for absent launchers when all ranks here have ended; call it when one has come.

        Ranks that never join any world start no join timeout.
        """
        absent = {rank for host in self._hosts.values() if not host.come for rank in host.ranks}
        here = [member for rank, member in self._members.items() if rank not in absent]
        when = None
        if absent and all(member.exit_code is not None for member in here):
            last = max(member.ended_at for member in here)
            when = last + max(1.0, self._job.options.join_timeout_s)
        self._loop.call_at(when, self._hosts_missing)

    def _hosts_missing(self) -> None:
        if self.failure is None:  # rule 11
            text = f"nobody else has come within {self._job.options.join_timeout_s:g} s"
            self.fail(Failure(-1, "rendezvous", f"all ranks here have ended, and {text}"))

    def _with_absent(self, failure: Failure) -> Failure:
        """Name the launchers that have not come, when a world could not be put together."""
        absent = [f"node {host.node}" for host in self._hosts.values() if not host.come]
        if failure.cause != "rendezvous" or not absent:
            return failure
        message = f"{failure.message} ({' and '.join(absent)} has not come)"
        return dataclasses.replace(failure, message=message)


def _lost(host: Host, how: str) -> Failure:
    return Failure(-1, "lost", f"node {host.node} (launcher) lost: {how}")
