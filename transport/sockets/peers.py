"""Brings the one connection to each peer into being: by our call at first use, or by theirs.

When both call at once, the lower rank's call goes ahead, on both sides by the same rule. A peer
that was lost is never connected to again: a stream that broke is not continued by another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
from collections.abc import Callable, Mapping
from typing import Final

from transport.errors import AuthenticationError, PeerLost, TransportError
from transport.sockets.addresses import Address, dial, within_host
from transport.sockets.connection import Connection
from transport.sockets.event_loop import Progress
from transport.sockets.handshake import Hello, Initiator, Role, Verdict
from transport.sockets.listener import Listener

CALL_TIMEOUT_S: Final = 10.0
RETRY_S: Final = 0.01  # between two attempts

Finish = Callable[["socket.socket | None", "TransportError | None"], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one rank is among the others.

    Attributes:
        rank, world_size: who it is.
        addresses: where each rank listens, by rank.
        listening: this rank's own listening sockets.
        secret: the job's secret, with which every connection is authenticated.
        unix: whether ranks of one host use a Unix stream.
        silence_s: how long another host may acknowledge nothing of what is sent to it; 0 for as
            long as TCP goes on trying.
    """

    rank: int
    world_size: int
    addresses: Mapping[int, Address]
    listening: list[socket.socket]
    secret: bytes
    unix: bool
    silence_s: float = 0.0


class Peers:
    """The connections of one rank. Every method is called under the lock of `Progress`.

    `make(rank)` makes a connection without a socket; `lose(connection, error)` is told when a peer
    cannot be reached.
    """

    def __init__(
        self,
        progress: Progress,
        place: Place,
        make: Callable[[int], Connection],
        lose: Callable[[Connection, TransportError], None],
    ) -> None:
        self.known: dict[int, Connection] = {}
        self._dialers: dict[int, Dialer] = {}  # our own attempts to connect, while they run
        self._progress = progress
        self.place = place
        self._make = make
        self._lose = lose
        self._expiry_due: float | None = None
        self._closed = False
        self.listener = Listener(place.secret, Role.DATA, place.rank, place.listening)
        progress.register(self.listener.fileno(), select.EPOLLIN, self._on_callers)

    def get(self, rank: int) -> Connection:
        """Return the connection to a peer, and start to connect at first use."""
        connection = self.known.get(rank)
        if connection is None:
            connection = self.known[rank] = self._make(rank)
            self._call(connection)
        return connection

    def stop_dialling(self, rank: int) -> None:
        """Give up our own attempt to connect, if there is one."""
        if dialer := self._dialers.pop(rank, None):
            dialer.cancel()

    def close(self) -> None:
        """Stop listening; the connections are their owner's to end."""
        self._closed = True
        self._progress.unregister(self.listener.fileno())
        self.listener.close()

    def _call(self, connection: Connection) -> None:
        def finish(sock: socket.socket | None, error: TransportError | None) -> None:
            self._dialers.pop(rank, None)
            if sock is not None:
                self._attach(connection, sock)
            elif error is not None:
                self._lose(connection, error)
            else:
                self._progress.call_after(CALL_TIMEOUT_S, check_called)

        def check_called() -> None:
            if not connection.connected:
                why = f"rank {rank} did not call within {CALL_TIMEOUT_S} s"
                self._lose(connection, PeerLost(why))

        rank = connection.peer
        self._dialers[rank] = Dialer(self._progress, self.place, rank, finish)

    def _attach(self, connection: Connection, sock: socket.socket) -> None:
        if self.place.silence_s:
            with contextlib.suppress(OSError):  # the peer is gone: reading finds out how
                if not within_host(sock):
                    self._look_after(connection, sock, self.place.silence_s)
        connection.attach(sock)

    def _look_after(self, connection: Connection, sock: socket.socket, silence_s: float) -> None:
        from transport.sockets.reachability import Reachability  # for other hosts alone

        why = f"nothing that was sent to it has been acknowledged for {silence_s:g} s"
        lost = PeerLost(f"rank {connection.peer} cannot be reached: {why}")
        Reachability(self._progress, sock, silence_s, lambda: self._lose(connection, lost))

    def _on_callers(self, mask: int) -> None:
        for sock, hello in self.listener.poll():
            verdict = self._judge(hello)
            with contextlib.suppress(OSError):  # a caller that is gone shows when it is read
                sock.send(bytes([verdict]))
            if verdict is not Verdict.ACCEPTED:
                sock.close()
                continue
            self.stop_dialling(hello.rank)
            if hello.rank not in self.known:
                self.known[hello.rank] = self._make(hello.rank)
            self._attach(self.known[hello.rank], sock)
        deadline = self.listener.next_deadline()
        if deadline is not None and self._expiry_due is None:  # one timer at a time
            self._expiry_due = deadline
            self._progress.call_at(deadline, self._expire_callers)

    def _expire_callers(self) -> None:
        self._expiry_due = None
        if not self._closed:
            self._on_callers(0)

    def _judge(self, hello: Hello) -> Verdict:
        place, known = self.place, self.known.get(hello.rank)
        if hello.rank == place.rank or not 0 <= hello.rank < place.world_size:
            return Verdict.TAKEN
        if known is not None and (known.connected or known.lost or known.ended is not None):
            return Verdict.TAKEN
        if hello.rank in self._dialers and place.rank < hello.rank:
            return Verdict.YIELD
        return Verdict.ACCEPTED


class Dialer:
    """Calls `peer`; `finish(socket, None)` or `finish(None, error)` is called back once.

    `finish(None, None)` means that the peer's own call goes ahead instead. A listener that hangs
    up before its verdict is called again until the deadline: when strangers crowd its port, the
    oldest caller has to give way, and that may be this one.
    """

    def __init__(self, progress: Progress, place: Place, peer: int, finish: Finish) -> None:
        self._progress = progress
        self._place = place
        self._peer = peer
        self._finish = finish
        self._socket: socket.socket | None = None
        self._over = False
        progress.call_after(CALL_TIMEOUT_S, self._on_deadline)
        self._dial()

    def cancel(self) -> None:
        """Give up without calling back."""
        self._over = True
        self._hang_up()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._progress.unregister(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _dial(self) -> None:
        if self._over:
            return
        place, address = self._place, self._place.addresses[self._peer]
        self._initiator = Initiator(place.secret, Hello(Role.DATA, place.rank, self._peer))
        self._connected = False
        self._gathered = bytearray()
        try:
            self._socket = dial(address, unix=place.unix)
        except BlockingIOError:
            self._dial_again()
        except OSError as error:
            # Not from within the constructor: the caller does not know this call yet.
            text = f"rank {self._peer} cannot be reached at {address.tcp}: {error.strerror}"
            self._progress.call_at(0.0, lambda: self._fail(PeerLost(text)))
        else:
            self._progress.register(self._socket.fileno(), select.EPOLLOUT, self._on_events)

    def _dial_again(self) -> None:
        self._hang_up()
        self._progress.call_after(RETRY_S, self._dial)

    def _on_deadline(self) -> None:
        self._fail(PeerLost(f"rank {self._peer} did not answer within {CALL_TIMEOUT_S} s"))

    def _fail(self, error: TransportError) -> None:
        if not self._over:
            self.cancel()
            self._finish(None, error)

    def _on_events(self, mask: int) -> None:
        assert self._socket is not None
        try:
            if not self._connected:
                self._on_connected(self._socket)
            else:
                self._on_answer(self._socket)
        except BlockingIOError:
            pass
        except (ConnectionResetError, BrokenPipeError):
            self._dial_again()
        except OSError as error:
            self._fail(PeerLost(f"rank {self._peer} cannot be reached: {error.strerror}"))
        except AuthenticationError as error:
            self._fail(AuthenticationError(f"calling rank {self._peer}: {error}"))

    def _on_connected(self, sock: socket.socket) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        sock.send(self._initiator.hello)  # 64 bytes always fit into an empty buffer
        self._connected = True
        self._progress.modify(sock.fileno(), select.EPOLLIN)

    def _on_answer(self, sock: socket.socket) -> None:
        data = sock.recv(self._initiator.needed - len(self._gathered))
        if not data:
            raise ConnectionResetError
        self._gathered += data
        if len(self._gathered) < self._initiator.needed:
            return
        answer = self._initiator.receive(bytes(self._gathered))
        self._gathered.clear()
        if answer:
            sock.send(answer)
        match self._initiator.verdict:
            case Verdict.ACCEPTED:
                self._over = True
                self._progress.unregister(sock.fileno())
                self._finish(sock, None)
            case Verdict.YIELD:
                self.cancel()
                self._finish(None, None)
            case Verdict.TAKEN:
                why = "it is connected to this rank already, or has given it up"
                self._fail(PeerLost(f"rank {self._peer} refuses this rank's call: {why}"))
