"""Node 0's connections to the launchers of the other nodes: the way from them to the referee.

It decides nothing: what a launcher says, and its end, are told to the referee, which knows the
rules. A launcher is told what ours has heard of its ranks, and the first failure.
"""

from __future__ import annotations

import dataclasses
import select
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from barepp.launch.hosts.protocol import Link, Nodes, share
from barepp.launch.job_state import Host, JobState, Member
from barepp.launch.referee import Hooks, Referee
from transport.errors import Failure, ProtocolError, printable
from transport.rendezvous.client import BEAT_S
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.server import DOING_LIMIT, RendezvousServer
from transport.sockets.addresses import serve, serve_at
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


@dataclasses.dataclass
class _Node(Host):
    """Another node, with the connection to its launcher once that has come."""

    link: Link | None = None
    told_stacks: bool = False  # whether it has taken its ranks' stacks

    @property
    def the_link(self) -> Link:
        """The connection, of a launcher that has come."""
        assert self.link is not None
        return self.link

    def send(self, record: dict[str, Any]) -> None:
        """Send its launcher a record."""
        self.the_link.send(record)


class Head:
    """Node 0's rendezvous, referee and connections to the launchers of the other nodes.

    Args:
        job: what is known of it; its members are all ranks.
        nodes: where this one is reached, and how many others there are.
        hooks: see `launch.referee.Referee`.
    """

    def __init__(self, job: JobState, nodes: Nodes, hooks: Hooks) -> None:
        self._job, self._loop, self._members = job, job.loop, job.members
        self._options, self._count = job.options, nodes.count
        world_size, others = job.options.world_size, range(1, nodes.count)
        self._hosts = {node: _Node(node, share(world_size, nodes.count, node)) for node in others}
        self._before_told = hooks.before_told
        self._given_up = False  # whether launchers had their time to say how their ranks ended
        self._stays = False  # whether launchers that are still to come shall be told of a failure
        self.server = RendezvousServer(
            world_size,
            nodes.secret,
            job.loop,
            self._take,
            # Our own ranks come by loopback: they must be heard when the network is gone.
            listening=[serve("127.0.0.1"), serve_at(nodes.host, nodes.port)],
            join_timeout_s=job.options.join_timeout_s,
            far=True,
            visit=self._visit,
        )
        hooks = Hooks(self._tell_failure, hooks.explain, self._judged)
        self.referee = Referee(job, self.server, hooks, hosts=self._hosts, far=True)
        self._beat()

    def over(self) -> bool:
        """Whether all ranks of other nodes have ended, or nobody can tell any more."""
        failed = self.referee.failure is not None
        return self._given_up or all(
            host.gone
            or (failed and not host.come and not self._stays)  # it has nothing to tell
            or all(self._members[rank].exit_code is not None for rank in host.ranks)
            for host in self._hosts.values()
        )

    def conclude(self) -> None:
        """All ranks have ended: settle what was only suspected, and let the launchers go."""
        self.referee.conclude()
        for host in self._here():
            host.send({"record": "over"})
        # A connection that is closed while bytes are unread is reset, and "over" would be lost.
        self._serve_until(lambda host: host.gone, FAREWELL_S, self._see_off)
        for host in self._here():
            self._hang_up(host)

    def _visit(self, sock: socket.socket, number: int) -> None:
        """Let a launcher in, whose number the rendezvous was told in the place of a rank."""
        node = -1 - number  # see `Nodes.number`
        try:
            sock.send(bytes([Verdict.ACCEPTED]))
        except OSError:
            sock.close()
            return
        link = Link(sock, self._options.heartbeat_s)
        host = self._hosts.get(node)
        if host is None or host.come:
            what = "has come already" if host else f"is none of {self._count} nodes"
            link.send({"record": "refused", "message": f"node {node} {what}"})
            link.close()
            return
        host.link, host.come, host.heard_at = link, True, link.heard_at
        self._loop.register(link.fileno(), partial(self._serve, host))
        failure = self.referee.failure
        if failure is not None:
            link.send({"record": "failure", "failure": failure.to_record()})
        self.referee.await_hosts()

    # -- what other launchers are told ------------------------------------------------------------

    def _take(self, event: Event) -> None:
        """Take what the rendezvous has heard of a rank, and tell it to the rank's own launcher."""
        self.referee.take(event)
        host = self._host_of(event.rank)
        if host is not None and event.kind in _FORWARDED:
            record = {"record": "event", "kind": event.kind.name, "rank": event.rank}
            if event.failure is not None:
                record["failure"] = event.failure.to_record()
            host.send({**record, "text": event.text, "state": event.state})

    def _judged(self, rank: int) -> None:
        """Tell a rank's own launcher that all its words have been heard."""
        host = self._host_of(rank)
        if host is not None:
            host.send({"record": "judged", "rank": rank})

    def _tell_failure(self, failure: Failure) -> None:
        """Tell the launchers the first failure, before any rank is told."""
        for host in self._here():
            host.send({"record": "failure", "failure": failure.to_record()})
        now = time.monotonic()
        wait_s = STACKS_S if failure.cause == "hang" else 0.0
        give_up_at = now + wait_s + self._options.grace_s + LAST_REPORTS_S
        self._loop.call_at(give_up_at, self._give_up)
        if failure.rank >= 0 or failure.cause != "signal":  # Ctrl-C waits for nobody
            self._stays = True
            self._loop.call_at(now + wait_s + STAY_S, self._stop_staying)
        self._before_told(failure)
        # The ranks elsewhere tell their stacks before the news of a hang unwinds those.
        left_s = max(0.0, now + wait_s - time.monotonic())
        self._serve_until(lambda host: host.told_stacks or host.gone, left_s, self._serve)

    def _give_up(self) -> None:
        self._given_up = True

    def _stop_staying(self) -> None:
        self._stays = False

    def _beat(self) -> None:
        for host in self._here():
            host.send({"record": "beat"})
        self._loop.call_at(time.monotonic() + BEAT_S, self._beat)

    def _here(self) -> list[_Node]:
        return [host for host in self._hosts.values() if host.come and not host.gone]

    def _host_of(self, rank: int) -> _Node | None:
        return next((host for host in self._here() if rank in host.ranks), None)

    # -- what they say ----------------------------------------------------------------------------

    def _serve_until(
        self, done: Callable[[_Node], bool], limit_s: float, serve: Callable[[_Node], None]
    ) -> None:
        """Serve launchers alone until all are done, for so long at most."""
        deadline = time.monotonic() + limit_s
        while waiting := [host for host in self._here() if not done(host)]:
            poll = select.poll()
            for host in waiting:
                poll.register(host.the_link.fileno(), select.POLLIN)
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1e3):
                return
            for host in waiting:
                serve(host)

    def _see_off(self, host: _Node) -> None:
        host.the_link.receive()
        if host.the_link.ended:
            self._hang_up(host)

    def _serve(self, host: _Node) -> None:
        link = host.the_link
        try:
            for record in link.receive():
                if not host.gone:  # after a goodbye nothing counts
                    self._handle(host, link, record)
        except ProtocolError as error:
            link.ended = f"it sent nonsense: {error}"
        host.heard_at = link.heard_at
        if link.ended and not host.gone:
            self._hang_up(host)
            self.referee.host_lost(host, link.ended)

    def _handle(self, host: _Node, link: Link, record: dict[str, Any]) -> None:
        match record:
            case {"record": "node", "nodes": int(count), "world_size": int(world_size)}:
                mine = self._options.world_size, self._count
                if (world_size, count) != mine:
                    message = (
                        f"node {host.node} was started with --world {world_size} --nodes {count}, "
                        f"node 0 with --world {mine[0]} --nodes {mine[1]}"
                    )
                    link.send({"record": "refused", "message": message})
                    self.referee.fail(Failure(-1, "rendezvous", message))
            case {"record": "asked"}:
                host.told_stacks = True
            case {"record": "started", "rank": int(rank), "pid": int(pid)}:
                self._job.events.write("started", self._member(host, rank).rank, pid=pid)
            case {"record": "ended", "rank": int(rank), "status": int(status), "killed": killed}:
                member = self._member(host, rank)
                member.killed, cut_off = killed is True, record.get("cut_off")
                if isinstance(cut_off, str):
                    member.cut_off = printable(cut_off, DOING_LIMIT)
                self.referee.ended(rank, status)
            case {"record": "failed", "failure": failure}:
                # Whoever it names: a launcher speaks for itself alone.
                failure = dataclasses.replace(Failure.from_record(failure), rank=-1)
                self.referee.fail(failure)
            case {"record": "bye"}:
                ended = all(self._members[rank].status is not None for rank in host.ranks)
                if self.referee.failure is None and not ended:
                    raise ProtocolError("it says goodbye before its ranks have ended")
                self._hang_up(host)
            case _:
                raise ProtocolError(f"there is no record {record!r:.100}")

    def _member(self, host: _Node, rank: int) -> Member:
        if rank not in host.ranks:
            raise ProtocolError(f"rank {rank} is not on node {host.node}")
        return self._members[rank]

    def _hang_up(self, host: _Node) -> None:
        host.gone = True
        self._loop.unregister(host.the_link.fileno())
        host.the_link.close()
