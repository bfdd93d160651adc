"""The launcher of another node than 0: asks node 0's what the first failure is, and tells it ours.

To its own job loop it is what the referee is on node 0. It decides nothing, but for one thing: when
node 0 cannot be reached any more, that is the failure.
"""

from __future__ import annotations

import select
import time
from collections.abc import Mapping
from typing import Any, Final

from barepp.launch.hang_detector import HangDetector
from barepp.launch.hosts.protocol import Link, Nodes
from barepp.launch.output import EventLog
from barepp.launch.processes.rank_process import Member
from barepp.launch.referee import LAST_WORDS_S, Hooks
from barepp.worker.heartbeat import Heartbeat
from barepp.worker.spec import Options
from transport.errors import Failure, ProtocolError, TransportError, printable
from transport.rendezvous.dial import dial
from transport.rendezvous.events import EventKind

VERDICT_S: Final = 1.0  # how long node 0 has to answer what we have told it
TELL_S: Final = 5.0  # how long node 0 is looked for that is to be told why this node does not come
HEARD_S: Final = 2 * LAST_WORDS_S  # how long it may wait for what a rank had still to say


class NodeAgent:
    """One node's line to node 0; blocks until it has been let in. See `referee.Referee`.

    Raises:
        RendezvousError, AuthenticationError: node 0 does not answer in time, or another job does.
    """

    def __init__(
        self,
        members: Mapping[int, Member],
        options: Options,
        watch: HangDetector,
        events: EventLog,
        hooks: Hooks,
        *,
        nodes: Nodes,
    ) -> None:
        self.failure: Failure | None = None
        self._members = members
        self._events = events
        self._watch = watch  # knows what our ranks say, for whoever asks; node 0 judges by it
        self._hooks = hooks
        self._pending: tuple[Failure, float] | None = None  # ours, which node 0 has not judged
        self._all_over = False
        self._linked = True  # its end has not been seen
        deadline = time.monotonic() + max(1.0, options.join_timeout_s)
        where = nodes.host, nodes.port
        sock = dial(where, nodes.secret, nodes.number(), deadline, patient=True)
        self._link = Link(sock, options.heartbeat_s)
        self._epoll = select.epoll()
        self._epoll.register(self._link.fileno(), select.EPOLLIN)
        self._link.send({"record": "node", "nodes": nodes.count, "world_size": options.world_size})

    def fileno(self) -> int:
        """Return the descriptor that is readable whenever `poll` has something to do."""
        return self._epoll.fileno()

    def next_deadline(self) -> float | None:
        """Return the `time.monotonic()` at which `poll` should be called at the latest."""
        return self._link.beat_at  # (nothing here is more urgent than that)

    def poll(self) -> None:
        """Take note of all that has happened, and act on it."""
        self._link.beat()
        try:
            for record in self._link.receive():
                self._handle(record)
        except ProtocolError as error:
            self._link.ended = f"it sent nonsense: {error}"
        if self._link.ended and self._linked:
            self._linked = False
            self._epoll.unregister(self._link.fileno())
        if self._link.ended and not self._all_over:
            self._take(Failure(-1, "lost", f"node 0 (launcher) lost: {self._link.ended}"))
        now = time.monotonic()
        if self._pending is not None and now >= self._pending[1]:
            self._take(self._pending[0])
        for member in self._members.values():
            if member.status is not None and (self._link.ended or now > member.ended_at + HEARD_S):
                member.exit_code = member.status

    def started(self, member: Member, pid: int) -> None:
        """Take note that a process has begun."""
        self._link.send({"record": "started", "rank": member.rank, "pid": pid})

    def ended(self, member: Member, status: int) -> None:
        """Take note that a process has ended."""
        member.status, member.ended_at = status, time.monotonic()
        self._watch.ended(member.rank, member.ended_at)
        better = self._hooks.explain() if status else None
        if better is not None:
            self.fail(better)
        member.doing = member.doing or member.cut_off or ""  # node 0 cannot have heard it
        how = {"status": status, "killed": member.killed, "cut_off": member.cut_off}
        self._link.send({"record": "ended", "rank": member.rank, **how})
        self._events.write("ended", member.rank, exit_code=status)

    def fail(self, failure: Failure) -> None:
        """Tell node 0 what befell this launcher; it decides whether that is the first failure."""
        if self._pending is None:
            self._pending = failure, time.monotonic() + VERDICT_S
            self._link.send({"record": "failed", "failure": failure.to_record()})

    def over(self) -> bool:
        """Whether nothing more is to be heard that changes how the job ended."""
        return self._all_over or self.failure is not None

    def conclude(self) -> None:
        """All ranks of this node have ended: hang up."""
        self._link.send({"record": "bye"})
        self._link.close()
        self._epoll.close()

    def _take(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            self._hooks.before_told(failure)
            record = {key: value for key, value in failure.to_record().items() if key != "rank"}
            self._events.write("failed", failure.rank, primary=True, **record)

    def _handle(self, record: dict[str, Any]) -> None:
        match record:
            case {"record": "failure", "failure": failure}:
                self._take(Failure.from_record(failure))
                self._link.send({"record": "asked"})
            case {"record": "judged", "rank": int(rank)}:
                if rank in self._members:
                    self._members[rank].exit_code = self._members[rank].status
            case {"record": "over"}:
                self._all_over = True
            case {"record": "refused", "message": str(message)}:
                self._take(Failure(-1, "rendezvous", printable(message, 1000)))
            case {"record": "event", "kind": str(kind), "rank": int(rank), "text": str(text)}:
                if rank in self._members:
                    self._hear(self._members[rank], kind, text, record)
            case _:
                raise ProtocolError(f"there is no record {record!r:.100}")

    def _hear(self, member: Member, kind: str, text: str, record: dict[str, Any]) -> None:
        """Take note of what node 0 has heard from one of our ranks."""
        if kind == EventKind.BEAT.name:
            self._watch.beat(
                member.rank, Heartbeat.from_record(record.get("state")), time.monotonic()
            )
        elif kind == EventKind.JOINED.name:
            member.joined, member.left = True, False
        elif kind == EventKind.LEFT.name:
            member.left = True
        elif kind == EventKind.DOING.name:
            member.doing = member.doing or printable(text, 200)
        elif kind == EventKind.REPORTED.name and member.reported is None:
            member.reported = Failure.from_record(record.get("failure"))


def tell_refusal(nodes: Nodes, world_size: int, why: str) -> None:
    """Tell node 0 that this node starts nothing, and why; if it is not there, nobody is told."""
    deadline = time.monotonic() + TELL_S
    where = nodes.host, nodes.port
    try:
        link = Link(dial(where, nodes.secret, nodes.number(), deadline, patient=True), 0.0)
    except TransportError:
        return
    message = f"node {nodes.node} starts nothing: {why}"
    failure = Failure(-1, "rendezvous", message, exit_code=2)
    link.send({"record": "node", "nodes": nodes.count, "world_size": world_size})
    link.send({"record": "failed", "failure": failure.to_record()})
    link.send({"record": "bye"})
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    # (A connection that is closed while bytes are unread is reset, and our words could be lost.)
    while not link.ended and poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        link.receive()
    link.close()
