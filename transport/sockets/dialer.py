"""One attempt to connect to a peer: dial, prove ourselves, hand over the socket or say why not.

Nothing here blocks, because `isend` must not: the steps run as handlers of `Progress`.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from transport.errors import AuthenticationError, PeerLost, TransportError
from transport.sockets.addresses import Address, dial
from transport.sockets.event_loop import Progress
from transport.sockets.handshake import Hello, Initiator, Role, Verdict

CALL_TIMEOUT_S: Final = 10.0
RETRY_S: Final = 0.01  # between two attempts

Finish = Callable[["socket.socket | None", "TransportError | None"], None]


class Dialer:
    """Calls `peer`; `finish(socket, None)` or `finish(None, error)` is called back once.

    `finish(None, None)` means that the peer's own call goes ahead instead. A listener that hangs
    up before its verdict is called again until the deadline: when strangers crowd its door, the
    oldest caller has to give way, and that may be this one.
    """

    def __init__(
        self,
        progress: Progress,
        address: Address,
        hello: tuple[int, int],
        secret: bytes,
        *,
        unix: bool,
        finish: Finish,
    ) -> None:
        rank, self._peer = hello
        self._progress = progress
        self._address = address
        self._secret = secret
        self._hello = Hello(Role.DATA, rank, self._peer)
        self._unix = unix
        self._finish = finish
        self._socket: socket.socket | None = None
        self._over = False
        self._deadline = time.monotonic() + CALL_TIMEOUT_S
        progress.call_at(self._deadline, self._on_deadline)
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
        self._initiator = Initiator(self._secret, self._hello)
        self._connected = False
        self._gathered = bytearray()
        try:
            self._socket = dial(self._address, unix=self._unix)
        except BlockingIOError:
            self._dial_again()
        except OSError as error:
            # Not from within the constructor: the caller does not know this call yet.
            text = f"rank {self._peer} cannot be reached at {self._address.tcp}: {error.strerror}"
            self._progress.call_at(0.0, lambda: self._fail(PeerLost(text)))
        else:
            self._progress.register(self._socket.fileno(), select.EPOLLOUT, self._on_events)

    def _dial_again(self) -> None:
        self._hang_up()
        self._progress.call_at(time.monotonic() + RETRY_S, self._dial)

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
