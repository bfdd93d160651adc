"""A listening socket that hands out only callers who have proved that they hold the job's secret.

1. Before the proof nothing is read but one hello and one proof of fixed size.
2. A caller has `HANDSHAKE_TIMEOUT_S` seconds; at most `MAX_PENDING` wait at once, and when one
   more comes the oldest is dropped. Strangers can therefore fill neither the memory nor the port.
3. A failed caller is closed without a word, and disturbs nobody.

Nothing here blocks. The owner polls `fileno()` for reading and calls `poll`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import time
from typing import Final

from transport.errors import AuthenticationError
from transport.sockets.handshake import Acceptor, Hello, Role

HANDSHAKE_TIMEOUT_S: Final = 5.0
MAX_PENDING: Final = 128
BACKLOG: Final = 1024


@dataclasses.dataclass
class _Caller:
    sock: socket.socket
    acceptor: Acceptor
    deadline: float
    gathered: bytearray


class Listener:
    """Accepts on any number of listening sockets and authenticates; see the rules above.

    `peer` is who the callers must have asked for: this rank, or `ANY_RANK` at the rendezvous.
    """

    def __init__(
        self, secret: bytes, role: Role, peer: int, listening: list[socket.socket]
    ) -> None:
        self._secret = secret
        self._role = role
        self._peer = peer
        self._listening = {sock.fileno(): sock for sock in listening}
        self._callers: dict[int, _Caller] = {}
        self.strangers = 0  # callers that failed to prove themselves, or took too long
        self._epoll = select.epoll()
        for sock in listening:
            sock.setblocking(False)
            self._epoll.register(sock, select.EPOLLIN)

    def fileno(self) -> int:
        """Return the descriptor that is readable whenever `poll` has something to do."""
        return self._epoll.fileno()

    def next_deadline(self) -> float | None:
        """Return the `time.monotonic()` at which `poll` should be called at the latest."""
        return min((caller.deadline for caller in self._callers.values()), default=None)

    def poll(self) -> list[tuple[socket.socket, Hello]]:
        """Go on with all callers; return those that are authenticated now.

        The owner answers each with one `Verdict` byte and owns the (non-blocking) socket.
        """
        now = time.monotonic()
        for fd in [fd for fd, caller in self._callers.items() if caller.deadline <= now]:
            self._drop(fd)
        authenticated = []
        for fd, _ in self._epoll.poll(0):
            if fd in self._listening:
                self._accept(self._listening[fd])
            elif fd in self._callers and (hello := self._advance(self._callers[fd])) is not None:
                self._epoll.unregister(fd)
                authenticated.append((self._callers.pop(fd).sock, hello))
        return authenticated

    def close(self) -> None:
        """Stop listening and drop the callers that are still on the doorstep."""
        for fd in list(self._callers):
            self._drop(fd)
        for sock in self._listening.values():
            sock.close()
        self._epoll.close()

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except OSError:  # the caller has gone again, or no descriptor is free: the oldest gives way
            if self._callers:
                self._drop(next(iter(self._callers)))
            return
        if len(self._callers) >= MAX_PENDING:
            self._drop(next(iter(self._callers)))
        sock.setblocking(False)
        acceptor = Acceptor(self._secret, self._role, self._peer)
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        self._callers[sock.fileno()] = _Caller(sock, acceptor, deadline, bytearray())
        self._epoll.register(sock, select.EPOLLIN)

    def _advance(self, caller: _Caller) -> Hello | None:
        try:
            data = caller.sock.recv(caller.acceptor.needed - len(caller.gathered))
            if not data:
                raise AuthenticationError("the caller hung up")
            caller.gathered += data
            if len(caller.gathered) == caller.acceptor.needed:
                answer = caller.acceptor.receive(bytes(caller.gathered))
                caller.gathered.clear()
                if answer and caller.sock.send(answer) != len(answer):
                    raise AuthenticationError("the caller does not take its challenge")
        except BlockingIOError:
            return None
        except (OSError, AuthenticationError):
            self._drop(caller.sock.fileno())
            return None
        return caller.acceptor.accepted

    def _drop(self, fd: int) -> None:
        self.strangers += 1
        caller = self._callers.pop(fd)
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        caller.sock.close()
