"""Node 0's referee: judges the ranks of other nodes by what their launchers say of them.

A launcher that is lost takes its ranks along, and is the cause: what its ranks did then, nobody
saw. When neither a rank nor its launcher gives a sign of life, the host is.
"""

from __future__ import annotations

import dataclasses
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from barepp.launch.hang_detector import HangDetector
from barepp.launch.hosts.protocol import Link, Nodes, node_of, share
from barepp.launch.output import EventLog
from barepp.launch.processes.rank_process import Member
from barepp.launch.referee import Hooks, Referee
from barepp.worker.spec import Options
from transport.errors import Failure, ProtocolError, printable
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.server import DOING_LIMIT, RendezvousServer
from transport.sockets.handshake import Verdict

LAST_REPORTS_S: Final = 2.0  # after the grace, for other launchers to say how their ranks ended
STAY_S: Final = 2.0  # after a failure, for launchers that are still on their way: they are told
STACKS_S: Final = 1.25  # for all launchers to take their ranks' stacks (see stacks.py)
FAREWELL_S: Final = 1.0  # for other launchers to hang up at the end
_FORWARDED: Final = (
    EventKind.JOINED,
    EventKind.BEAT,
    EventKind.LEFT,
    EventKind.DOING,
    EventKind.REPORTED,
)


class HeadReferee(Referee):
    """A referee whose job runs on several nodes; see `referee.Referee` for the arguments."""

    def __init__(
        self,
        members: Mapping[int, Member],
        watch: HangDetector,
        server: RendezvousServer,
        events: EventLog,
        hooks: Hooks,
    ) -> None:
        local = hooks.before_told
        hooks = dataclasses.replace(hooks, before_told=lambda f: self._tell_nodes(f, local))
        super().__init__(members, watch, server, events, hooks, far=True)
        self._links: dict[int, Link] = {}  # by node
        self._told_stacks: set[int] = set()  # nodes that have taken their ranks' stacks
        self._done: set[int] = set()  # nodes that have hung up, in order or not
        self._give_up_at: float | None = None
        self._stay_until: float | None = None
        self._epoll = select.epoll()
        self._epoll.register(server.fileno(), select.EPOLLIN)

    def lead(self, options: Options, nodes: Nodes) -> None:
        """Let the launchers of the other nodes come in."""
        self._options = options
        self._nodes = nodes
        self._server.visit = self._visit

    def fileno(self) -> int:
        """Return the descriptor that is readable whenever `poll` has something to do."""
        return self._epoll.fileno()

    def next_deadline(self) -> float | None:
        """Return the `time.monotonic()` at which `poll` should be called at the latest."""
        deadlines = [super().next_deadline(), self._give_up_at, self._come_by()]
        deadlines.append(self._stay_until if self._stays() else None)
        deadlines += [link.beat_at for node, link in self._links.items() if node not in self._done]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def poll(self) -> None:
        """Take note of all that has happened, and act on it."""
        for node, link in list(self._links.items()):
            if node not in self._done:
                self._serve(node, link)
        super().poll()

    def over(self) -> bool:
        """Whether all ranks of other nodes have ended, or nobody can tell any more."""
        if self._give_up_at is not None and time.monotonic() >= self._give_up_at:
            return True
        gone = set(self._done)
        if self.failure is not None and not self._stays():
            gone |= self._absent()  # who has not come has nothing to tell
        return all(
            member.exit_code is not None or self._node_of(rank) in gone
            for rank, member in self._members.items()
        )

    def conclude(self) -> None:
        """All ranks have ended: settle what was only suspected, and let the launchers go."""
        super().conclude()
        for link in self._links.values():
            link.send({"record": "over"})
        deadline = time.monotonic() + FAREWELL_S
        while self._links.keys() - self._done and time.monotonic() < deadline:
            # A connection that is closed while bytes are unread is reset, and "over" would be lost.
            self._epoll.poll(max(0.0, deadline - time.monotonic()))
            for node in self._links.keys() - self._done:
                self._links[node].receive()
                if self._links[node].ended:
                    self._hang_up(node)
        for node in self._links.keys() - self._done:
            self._hang_up(node)
        self._epoll.close()

    def fail(self, failure: Failure) -> None:
        """Take a failure; a rank that has not come is on a node that has not, perhaps."""
        absent = self._absent()
        if failure.cause == "rendezvous" and absent and self.failure is None:
            names = " and ".join(f"node {node}" for node in sorted(absent))
            message = f"{failure.message} ({names} has not come)"
            failure = dataclasses.replace(failure, message=message)
        super().fail(failure)

    def _absent(self) -> set[int]:
        return set(range(1, self._nodes.count)) - self._links.keys()

    def _stays(self) -> bool:
        """Whether absent launchers are waited for that shall be told of a failure."""
        until = self._stay_until
        return until is not None and time.monotonic() < until and bool(self._absent())

    def _come_by(self) -> float | None:
        """Return until when absent launchers are waited for; None while a rank may wait for them.

        Ranks that never join any world, and have ended, start no join timeout.
        """
        absent = self._absent() if self.failure is None else set()
        here = [m for rank, m in self._members.items() if self._node_of(rank) not in absent]
        if not absent or not here or any(member.exit_code is None for member in here):
            return None
        return max(member.ended_at for member in here) + max(1.0, self._options.join_timeout_s)

    def _check_deadlines(self) -> None:
        super()._check_deadlines()
        come_by = self._come_by()
        if come_by is not None and time.monotonic() >= come_by:
            text = f"nobody else has come within {self._options.join_timeout_s:g} s"
            self.fail(Failure(-1, "rendezvous", f"all ranks here have ended, and {text}"))

    # -- launchers --------------------------------------------------------------------------------

    def _visit(self, sock: socket.socket, number: int) -> None:
        """Let a launcher in, whose number the rendezvous was told in the place of a rank."""
        node = Nodes.from_number(number)
        try:
            sock.send(bytes([Verdict.ACCEPTED]))
        except OSError:
            sock.close()
            return
        link = Link(sock, self._options.heartbeat_s)
        if node in self._links or not 0 < node < self._nodes.count:
            count = self._nodes.count
            what = "has come already" if node in self._links else f"is none of {count} nodes"
            link.send({"record": "refused", "message": f"node {node} {what}"})
            link.close()
            return
        self._links[node] = link
        self._epoll.register(link.fileno(), select.EPOLLIN)
        if self.failure is not None:
            link.send({"record": "failure", "failure": self.failure.to_record()})

    def _serve(self, node: int, link: Link) -> None:
        link.beat()
        try:
            for record in link.receive():
                if node not in self._done:  # after a goodbye nothing counts
                    self._handle(node, link, record)
        except ProtocolError as error:
            link.ended = f"it sent nonsense: {error}"
        if link.ended and node not in self._done:
            self._hang_up(node)
            self.fail(self._lost(node, link.ended))

    def _handle(self, node: int, link: Link, record: dict[str, Any]) -> None:
        match record:
            case {"record": "node", "nodes": int(count), "world_size": int(world_size)}:
                mine = self._options.world_size, self._nodes.count
                if (world_size, count) != mine:
                    message = (
                        f"node {node} was started with --world {world_size} --nodes {count}, node "
                        f"0 with --world {mine[0]} --nodes {mine[1]}"
                    )
                    link.send({"record": "refused", "message": message})
                    self.fail(Failure(-1, "rendezvous", message))
            case {"record": "asked"}:
                self._told_stacks.add(node)
            case {"record": "started", "rank": int(rank), "pid": int(pid)}:
                self._events.write("started", self._member(node, rank).rank, pid=pid)
            case {"record": "ended", "rank": int(rank), "status": int(status), "killed": killed}:
                member = self._member(node, rank)
                member.killed, cut_off = killed is True, record.get("cut_off")
                if isinstance(cut_off, str):
                    member.cut_off = printable(cut_off, DOING_LIMIT)
                self.ended(member, status)
            case {"record": "failed", "failure": failure}:
                # Whoever it names: a launcher speaks for itself alone.
                self.fail(dataclasses.replace(Failure.from_record(failure), rank=-1))
            case {"record": "bye"}:
                self._check_goodbye(node)
                self._hang_up(node)
            case _:
                raise ProtocolError(f"there is no record {record!r:.100}")

    def _member(self, node: int, rank: int) -> Member:
        if rank not in share(self._options.world_size, self._nodes.count, node):
            raise ProtocolError(f"rank {rank} is not on node {node}")
        return self._members[rank]

    def _check_goodbye(self, node: int) -> None:
        mine = share(self._options.world_size, self._nodes.count, node)
        if self.failure is None and any(self._members[rank].status is None for rank in mine):
            raise ProtocolError("it says goodbye before its ranks have ended")

    def _hang_up(self, node: int) -> None:
        self._done.add(node)
        self._epoll.unregister(self._links[node].fileno())
        self._links[node].close()

    def _lost(self, node: int, how: str) -> Failure:
        return Failure(-1, "lost", f"node {node} (launcher) lost: {how}")

    # -- ranks ------------------------------------------------------------------------------------

    def _node_of(self, rank: int) -> int:
        return node_of(self._options.world_size, self._nodes.count, rank)

    def _take(self, member: Member, event: Event) -> None:
        super()._take(member, event)
        link = self._links.get(self._node_of(member.rank))
        if link is not None and event.kind in _FORWARDED:
            record = {"record": "event", "kind": event.kind.name, "rank": member.rank}
            if event.failure is not None:
                record["failure"] = event.failure.to_record()
            link.send({**record, "text": event.text, "state": event.state})

    def _judge(self, member: Member, status: int) -> None:
        super()._judge(member, status)
        link = self._links.get(self._node_of(member.rank))
        if link is not None and member.exit_code is not None:  # all its words have been heard
            link.send({"record": "judged", "rank": member.rank})

    def _refined(self, hang: Failure) -> Failure:
        """A silent rank whose launcher is silent as well: its host is lost."""
        node = self._node_of(hang.rank) if hang.rank >= 0 else 0
        link, silence_s = self._links.get(node), self._options.heartbeat_s
        if link is None or time.monotonic() - link.heard_at < max(1.0, silence_s / 2):
            return hang
        return self._lost(node, f"no sign of life from it or its ranks for {silence_s:g} s")

    def _tell_nodes(self, failure: Failure, local: Callable[[Failure], None]) -> None:
        deadline = time.monotonic() + STACKS_S
        for node, link in self._links.items():
            if node not in self._done:
                link.send({"record": "failure", "failure": failure.to_record()})
        local(failure)
        if failure.cause == "hang":
            self._wait_for_stacks(deadline)
        now = time.monotonic()
        self._give_up_at = now + self._options.grace_s + LAST_REPORTS_S
        interrupted = failure.rank < 0 and failure.cause == "signal"  # Ctrl-C waits for nobody
        self._stay_until = now if interrupted else now + STAY_S

    def _wait_for_stacks(self, deadline: float) -> None:
        """Let the ranks elsewhere tell their stacks before the news of the hang unwinds those."""
        while waiting := self._links.keys() - self._done - self._told_stacks:
            left = deadline - time.monotonic()
            poll = select.poll()
            for node in waiting:
                poll.register(self._links[node].fileno(), select.POLLIN)
            if left <= 0 or not poll.poll(left * 1e3):
                return
            for node in waiting:
                self._serve(node, self._links[node])
