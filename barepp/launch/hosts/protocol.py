"""The launchers of one job on several hosts: who has which ranks, and how they speak.

    node 0's launcher: rendezvous and referee <── control connections ── all ranks, on all nodes
        ▲  │                                       (the kernel kills them with their own launcher)
        │  └── failure, event, judged, over, beat
        └───── node, started, ended, asked, failed, bye, beat ── node 1's launcher, node 2's …

Records, one msgpack map a frame:

    node {node, nodes, world_size}    the first one; node 0 may answer with refused {message}
    started {rank, pid}               a process of that node has begun
    ended {rank, status, killed,      it has ended; a negative status is a signal; cut_off is what
           cut_off}                   it was about when it lost its control connection, or nil
    asked                             it has taken its ranks' stacks, having been told
    failed {failure}                  what befell the launcher itself: Ctrl-C, for example
    event {kind, rank, …}             what node 0 has heard from a rank of that node
    judged {rank}                     it has ended, and all that it had said has been heard
    failure {failure}                 the first cause
    over                              every rank on every node has ended
    bye                               the launcher hangs up in order
    beat                              a sign of life, twice a second, in both directions
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from typing import Any

from transport.rendezvous.client import UNREACHABLE
from transport.sockets.addresses import address_beside
from transport.wire.records import RecordStream


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Which launcher of several this is.

    Attributes:
        node, count: its number, and how many there are.
        host, port: where node 0 serves the rendezvous.
        secret: what all launchers of the job share.
        address: where other hosts reach this one; "" is where it reaches the rendezvous from.
    """

    node: int
    count: int
    host: str
    port: int
    secret: bytes = dataclasses.field(repr=False)
    address: str = ""

    def own_address(self) -> str:
        """Return where this node's ranks listen; "" is where they reach the rendezvous from."""
        return self.address or address_beside(self.host, here=self.node == 0)

    def number(self) -> int:
        """Return what the launcher says in the place of a rank when it calls: -2 for node 1."""
        return -1 - self.node


def share(world_size: int, count: int, node: int) -> range:
    """Return the ranks of a node: as even as possible, the first nodes have the larger shares."""
    least, more = divmod(world_size, count)
    first = node * least + min(node, more)
    return range(first, first + least + (node < more))


class Link:
    """One end of the connection between two launchers, on a non-blocking socket.

    Attributes:
        ended: how the connection ended, in words; "" while it has not.
        heard_at: when the other one last said anything, in seconds of `time.monotonic()`.
    """

    def __init__(self, sock: socket.socket, silence_s: float) -> None:
        self.ended = ""
        self.heard_at = time.monotonic()
        self._silence_s = silence_s
        self._stream = RecordStream(sock)
        if silence_s:  # see rendezvous/client.py: a host that vanished acknowledges nothing
            limit_ms = max(1, int(silence_s * 1000))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._stream.socket.fileno()

    def send(self, record: dict[str, Any]) -> None:
        """Send a record; when the other one is gone, reading finds that out."""
        with contextlib.suppress(OSError):
            self._stream.send(record)

    def receive(self) -> list[dict[str, Any]]:
        """Return the records that are here, without the signs of life."""
        if self.ended:
            return []
        records, goes_on = self._stream.receive()
        if records:
            self.heard_at = time.monotonic()
        if not goes_on:
            self.ended = self._how()
        return [record for record in records if record["record"] != "beat"]

    def _how(self) -> str:
        if self._stream.error is not None:
            return f"it sent nonsense: {self._stream.error}"
        if getattr(self._stream.broken, "errno", 0) in UNREACHABLE:
            return f"no sign of life for {self._silence_s:g} s"
        return "its connection ended"

    def close(self) -> None:
        """Hang up."""
        self._stream.socket.close()
