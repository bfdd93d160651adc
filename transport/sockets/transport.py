"""The socket transport: one stream a pair of ranks, opened at first use, tensors sent as frames.

Ranks of one host talk over a Unix stream, others over TCP: the same code, another address family.
The transport named "tcp" uses TCP everywhere; "unix" is this file with both families.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final

from transport.base import DEFAULT_UNEXPECTED_LIMIT, Transport
from transport.errors import (
    DeviceError,
    InternalError,
    PeerLeft,
    ProtocolError,
    TransportClosed,
    TransportError,
    WaitTimeout,
    fresh,
)
from transport.message.mailbox import Mailbox
from transport.message.specs import Message
from transport.message.tensors import prepare, unsupported_host
from transport.message.work import Receive, Send, Work
from transport.sockets.addresses import Address, listen
from transport.sockets.buffer_pool import Pool
from transport.sockets.connection import Connection
from transport.sockets.event_loop import Progress
from transport.sockets.peers import Peers, Place
from transport.wire.format import FrameKind, Limits

if TYPE_CHECKING:
    from transport.device import Gpu

CLOSED: Final = "this rank has closed its transport"
FLUSH_POLL_S: Final = 0.001  # no event says that the peer's kernel has acknowledged everything


class Farewell(Work):
    """The end of a transport: done when everything is flushed."""

    __slots__ = ()
    doing = "saying goodbye"


class TcpTransport(Transport):
    """One rank's connections to the others; see `base.Transport` for what it promises.

    Args:
        rank, world_size, addresses, listening, secret, silence_s: see `peers.Place`.
        lost_grace_s: after the loss of a peer, seconds to wait for `abort` to name the cause
            before the waiting calls raise `PeerLost`.
        unexpected_limit: bytes of messages that nobody has asked for, held per peer.
        limits: upper bounds of a frame, for both directions.
        checksum: whether each payload that is sent carries a sum, which its receiver checks.
        gpu: this rank's GPU, whose tensors are moved as well; None: CPU tensors alone.
    """

    name: ClassVar[str] = "tcp"
    unix: ClassVar[bool] = False
    connection_class: ClassVar[type[Connection]] = Connection  # how payloads travel

    def __init__(
        self,
        rank: int,
        world_size: int,
        addresses: Mapping[int, Address],
        listening: list[socket.socket],
        secret: bytes,
        *,
        silence_s: float = 0.0,
        lost_grace_s: float = 0.0,
        unexpected_limit: int = DEFAULT_UNEXPECTED_LIMIT,
        limits: Limits | None = None,
        checksum: bool = False,
        gpu: Gpu | None = None,
    ) -> None:
        super().__init__(rank, world_size, gpu)
        self._lost_grace_s = lost_grace_s
        self.unexpected_limit = unexpected_limit
        self.limits = limits or Limits()
        self.checksum = checksum
        self._pool = Pool()
        room = self._pool.allocate
        self._mailbox = Mailbox(room)
        if gpu is not None:
            from transport.message.gpu_mailbox import GpuMailbox

            self._mailbox = GpuMailbox(rank, gpu, room)
        self._farewell: Work | None = None  # set by `close`, done when all is flushed
        self._ended: TransportError | None = None
        self.progress = Progress(f"barepp-progress-{rank}", self._on_crash, self._resume_all)
        self._lock, self._guard = self.progress.lock, self.progress.guard
        with self._lock, self._guard:
            place = Place(rank, world_size, addresses, listening, secret, self.unix, silence_s)
            self._contacts = Peers(self.progress, place, self._make, self._lose)
        self._peers = self._contacts.known

    @staticmethod
    def viable() -> str | None:
        """Return why this machine cannot use sockets for tensors, None when it can."""
        return unsupported_host()

    @classmethod
    def listen(cls, bind: str = "127.0.0.1") -> tuple[list[socket.socket], Address]:
        """Open the listening sockets that a rank of this transport needs."""
        return listen(unix=cls.unix, bind=bind)

    # -- the contract -----------------------------------------------------------------------------

    def post_send(self, message: Message, dst: int, tag: int) -> Work:
        """Hand the message to the kernel as far as it takes it now; queue the rest."""
        spec, tensors = prepare(message, self.gpu)
        work = Send(self, dst, tag)
        with self._lock, self._guard:
            self._peer(dst).send(spec, tensors, work)
            self.traffic.sent[dst] += 1
            self.traffic.sent_nbytes += spec.nbytes
        return work

    def post_receive(self, receive: Receive) -> None:
        """Match the receive with what is here already, or let it wait."""
        with self._lock, self._guard:
            self._raise_if_ended()
            self._mailbox.post(receive)
            peer = self._peers.get(receive.peer) or self._contacts.get(receive.peer)
            if peer.pending is not None:
                peer.resume()
            if peer.ended is not None and not receive.done:
                self._mailbox.fail(peer.ended, receive.peer)

    def withdraw(self, receive: Receive) -> bool:
        """Take a posted receive back; False when it is done already."""
        with self._lock, self._guard:
            arriving = self._contacts.get(receive.peer).arriving
            return self._mailbox.withdraw(receive, arriving)

    def progress_until(self, work: Work, timeout: float | None) -> bool:
        """Move bytes on all connections until the work is done; False when time ran out."""
        return self.progress.run_until(work, timeout)

    def close(self, timeout: float | None = None) -> None:
        """Send what is queued, say goodbye to every peer and end."""
        with self._lock, self._guard:
            if self._farewell is not None:
                return
            farewell = self._farewell = Farewell(self, self.rank, 0)
            if self._ended is None:
                for peer in list(self._peers.values()):
                    if peer.ended is None and not peer.lost:
                        peer.queue(FrameKind.GOODBYE, None)
                self._check_farewell()
            else:
                farewell.complete()
        try:
            if not self.progress.run_until(farewell, timeout):
                slow = sorted(rank for rank, peer in self._peers.items() if not peer.may_close)
                raise WaitTimeout(f"ranks {slow} did not take what is queued within {timeout} s")
            farewell.wait()
        finally:
            self.abort(TransportClosed(CLOSED))

    def abort(self, error: TransportError) -> None:
        """Fail everything that waits, close every socket and stop."""
        with self._lock, self._guard:
            self._end(error)
        self.progress.stop()
        for peer in list(self._peers.values()):
            peer.join()

    def _end(self, error: TransportError) -> None:
        if self._ended is not None:
            return
        self._ended = error
        self.progress.end(error)
        self._contacts.close()
        self._pool.close()
        self._mailbox.fail(error)
        for peer in self._peers.values():
            self._end_peer(peer, error)
        if self._farewell is not None and not self._farewell.done:
            self._farewell.fail(error)

    def _on_crash(self, error: BaseException) -> None:
        """End, because nobody knows in which state that error has left a stream."""
        broken = InternalError(
            f"rank {self.rank}'s transport broke: {type(error).__name__}: {error}"
        )
        broken.__cause__ = error
        self._end(error if isinstance(error, DeviceError) else broken)

    def _peer(self, rank: int) -> Connection:
        """Return a peer that a message can still go to, and connect at first use."""
        self._raise_if_ended()
        peer = self._peers.get(rank) or self._contacts.get(rank)
        if peer.ended is not None:
            raise fresh(peer.ended)
        return peer

    def _raise_if_ended(self) -> None:
        if self._ended is not None:
            raise fresh(self._ended)
        if self._farewell is not None:
            raise TransportClosed(CLOSED)

    def _check_farewell(self) -> None:
        if self._farewell is None or self._farewell.done:
            return
        if all(peer.may_close for peer in self._peers.values()):
            self._farewell.complete()
        else:
            self.progress.call_after(FLUSH_POLL_S, self._check_farewell)

    def _resume_all(self) -> None:
        """Read on from every peer, because some thread begins to wait: to stop could deadlock."""
        for peer in self._peers.values():
            if peer.pending is not None and self._farewell is None:
                with self._guard:
                    peer.resume()

    # -- a peer's beginning and end ---------------------------------------------------------------

    def _make(self, rank: int) -> Connection:
        return self.connection_class(self, self._mailbox, rank)

    def _lose(self, peer: Connection, error: TransportError) -> None:
        """A peer is gone without a goodbye; leave `abort` a moment to tell why."""
        if peer.lost or peer.ended is not None:
            return
        peer.lost = True
        peer.close_socket()
        if self._lost_grace_s:
            self.progress.call_after(self._lost_grace_s, lambda: self._end_peer(peer, error))
        else:
            self._end_peer(peer, error)

    def _end_peer(self, peer: Connection, error: TransportError) -> None:
        if peer.ended is not None:
            return
        self._contacts.stop_dialling(peer.peer)
        peer.detach(error)
        self._mailbox.fail(error, peer.peer)
        self.progress.wake()  # other threads may wait for what has just failed

    # -- what a connection asks (see connection.Owner) --------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether this rank has said goodbye to all others."""
        return self._farewell is not None

    def on_goodbye(self, connection: Connection) -> None:
        """Act on a goodbye."""
        gone = f"rank {connection.peer} has left, so nothing more comes from it"
        self._end_peer(connection, PeerLeft(gone))

    def on_end(self, connection: Connection, error: TransportError) -> None:
        """The stream broke, or its bytes made no sense: it is never used again."""
        if isinstance(error, ProtocolError):
            self._end_peer(connection, ProtocolError(f"from rank {connection.peer}: {error}"))
        elif self._farewell is not None and connection.flushed:
            # It hung up in answer to our goodbye.
            self._end_peer(connection, TransportClosed(CLOSED))
        else:
            self._lose(connection, error)


class UnixTransport(TcpTransport):
    """The socket transport with Unix streams between ranks of one host and TCP between others."""

    name: ClassVar[str] = "unix"
    unix: ClassVar[bool] = True
