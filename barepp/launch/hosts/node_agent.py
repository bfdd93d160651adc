"""The launcher of another node than 0: asks node 0's what the first failure is, and tells it ours.

To its own job it is what the referee is on node 0. It decides nothing, but for one thing: when
node 0 is gone or does not answer, what this launcher knows itself is the failure.
"""

from __future__ import annotations

import select
import time
from typing import Any, Final

from barepp.launch.hosts.protocol import Link, Nodes
from barepp.launch.job_state import JobState
from barepp.launch.referee import LAST_WORDS_S, Hooks
from transport.errors import Failure, ProtocolError, TransportError, printable
from transport.rendezvous.client import BEAT_S
from transport.rendezvous.dial import dial
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.server import DOING_LIMIT

VERDICT_S: Final = 1.0  # how long node 0 has to answer what we have told it
TELL_S: Final = 5.0  # how long node 0 is looked for that is to be told why this node does not come
HEARD_S: Final = 2 * LAST_WORDS_S  # how long it may wait for what a rank had still to say


class NodeAgent:
    """One node's line to node 0; blocks until it has been let in. See `referee.Referee`.

    Raises:
        RendezvousError, AuthenticationError: node 0 does not answer in time, or another job does.
    """

    def __init__(self, job: JobState, nodes: Nodes, hooks: Hooks) -> None:
        self.failure: Failure | None = None
        self._job, self._loop, self._hooks = job, job.loop, hooks
        options = job.options
        self._told = False  # whether node 0 has been told a failure of ours
        self._all_over = False
        deadline = time.monotonic() + max(1.0, options.join_timeout_s)
        where = nodes.host, nodes.port
        sock = dial(where, nodes.secret, nodes.number(), deadline, patient=True)
        self._link = Link(sock, options.heartbeat_s)
        self._loop.register(self._link.fileno(), self._serve)
        self._link.send({"record": "node", "nodes": nodes.count, "world_size": options.world_size})
        self._beat()

    def started(self, rank: int, pid: int) -> None:
        """Take note that a process has begun."""
        self._link.send({"record": "started", "rank": rank, "pid": pid})

    def ended(self, rank: int, status: int) -> None:
        """Take note that a process has ended."""
        member = self._job.ended(rank, status)
        self._job.watch.ended(rank, member.ended_at)
        better = self._hooks.explain() if status else None
        if better is not None:
            self.fail(better)
        member.doing = member.doing or member.cut_off or ""  # node 0 cannot have heard it
        how = {"status": status, "killed": member.killed, "cut_off": member.cut_off}
        self._link.send({"record": "ended", "rank": rank, **how})
        self._job.events.write("ended", rank, exit_code=status)
        self._loop.call_at(
            0.0 if self._link.ended else member.ended_at + HEARD_S, self._settle, rank
        )

    def fail(self, failure: Failure) -> None:
        """Tell node 0 what befell this launcher; it decides whether that is the first failure."""
        if not self._told:
            self._told = True
            self._loop.call_at(time.monotonic() + VERDICT_S, self._take, failure)
            self._link.send({"record": "failed", "failure": failure.to_record()})

    def over(self) -> bool:
        """Whether nothing more is to be heard that changes how the job ended."""
        return self._all_over or self.failure is not None

    def conclude(self) -> None:
        """All ranks of this node have ended: hang up."""
        self._link.send({"record": "bye"})
        self._loop.unregister(self._link.fileno())
        self._link.close()

    def _beat(self) -> None:
        self._link.send({"record": "beat"})
        self._loop.call_at(time.monotonic() + BEAT_S, self._beat)

    def _serve(self) -> None:
        try:
            for record in self._link.receive():
                self._handle(record)
        except ProtocolError as error:
            self._link.ended = f"it sent nonsense: {error}"
        if self._link.ended:
            self._loop.unregister(self._link.fileno())
            if not self._all_over:
                self._take(Failure(-1, "lost", f"node 0 (launcher) lost: {self._link.ended}"))
            for rank, member in self._job.members.items():
                if member.status is not None:
                    self._settle(rank)

    def _settle(self, rank: int) -> None:
        """No more is heard of a rank that has ended."""
        self._job.members[rank].exit_code = self._job.members[rank].status

    def _take(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            self._hooks.before_told(failure)
            self._job.write_failure(failure, primary=True)

    def _handle(self, record: dict[str, Any]) -> None:
        match record:
            case {"record": "failure", "failure": failure}:
                self._take(Failure.from_record(failure))
                self._link.send({"record": "asked"})
            case {"record": "judged", "rank": int(rank)}:
                if rank in self._job.members:
                    self._settle(rank)
            case {"record": "over"}:
                self._all_over = True
            case {"record": "refused", "message": str(message)}:
                self._take(Failure(-1, "rendezvous", printable(message, 1000)))
            case {"record": "event", "kind": str(kind), "rank": int(rank), "text": str(text)}:
                told, state = record.get("failure"), record.get("state")
                failure = None if told is None else Failure.from_record(told)
                if rank in self._job.members and kind in EventKind.__members__:
                    words = printable(text, DOING_LIMIT)
                    self._job.note(Event(EventKind[kind], rank, failure, words, state))
            case _:
                raise ProtocolError(f"there is no record {record!r:.100}")


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
