"""The Unix socket at which a launcher answers this user's other processes, without any file.

1. The socket has an abstract name (unix(7)), which ends with the process: nothing can be left
   behind. Every user can see the name, so it tells only the user and the launcher's process id.
2. The kernel says which user calls (SO_PEERCRED). A connection of another user is closed before
   a byte is read.
3. A question is one record with a name and nothing else; what it holds besides is not looked at.
   A caller asks one at a time. The connection is closed when it asks a second question before it
   has taken the first one's answer, or sends bytes that make no sense. So a caller that does not
   read costs the memory of one answer, and no time.
4. Nothing here blocks: the owner's event loop serves it.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

from transport.rendezvous.loop import EventLoop
from transport.wire.format import Limits
from transport.wire.records import RecordStream

MAX_CALLERS: Final = 16  # at one time; for one more the one that has been quiet longest has to go
QUESTION_LIMITS: Final = Limits(meta_nbytes=1024, payload_nbytes=0)
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)


def socket_prefix(uid: int) -> str:
    """Return how the names of a user's status sockets begin; launcher's pid and a token follow."""
    return f"barepp-job-{uid}-"


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Return the process id and the user id of the other side, as the kernel knows them."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


@dataclasses.dataclass
class Caller:
    """One connection; `answer` it once for each question."""

    stream: RecordStream
    records: Iterator[dict[str, Any]] = dataclasses.field(default_factory=lambda: iter(()))
    asked: bool = False  # and not answered in full

    def answer(self, records: Iterable[dict[str, Any]]) -> None:
        """Let the socket send these, one after the other, as fast as the caller takes them."""
        self.records = iter([*records, {"record": "end"}])


class StatusSocket:
    """Lets callers in, and hands each question to `on_question` with the caller to be answered."""

    def __init__(self, loop: EventLoop, on_question: Callable[[str, Caller], None]) -> None:
        self._loop, self._on_question = loop, on_question
        self._callers: dict[int, Caller] = {}  # by descriptor; the one that asked last stands last
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.setblocking(False)
        # The token keeps another user from taking the name before us.
        name = f"{socket_prefix(os.getuid())}{os.getpid()}-{secrets.token_hex(4)}"
        self._listening.bind("\0" + name)
        self._listening.listen(MAX_CALLERS)
        loop.register(self._listening.fileno(), self._let_in)

    def send(self, caller: Caller) -> None:
        """Send what the kernel takes of a caller's answer, if the caller is still there."""
        fd = caller.stream.socket.fileno()
        if fd not in self._callers:
            return
        try:
            caller.stream.flush()
            while not caller.stream.unsent:
                record = next(caller.records, None)
                if record is None:
                    break
                caller.stream.send(record)
                caller.asked = record["record"] != "end"
        except OSError:
            self._hang_up(fd)
            return
        self._loop.await_room(fd, caller.stream.unsent)

    def close(self) -> None:
        """Close all connections and the socket."""
        for fd in list(self._callers):
            self._hang_up(fd)
        self._loop.unregister(self._listening.fileno())
        self._listening.close()

    def _let_in(self) -> None:
        try:
            sock, _ = self._listening.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor is left: the waiting caller would wake us for ever
            self._loop.unregister(self._listening.fileno())
            return
        if peer_of(sock)[1] != os.getuid():
            sock.close()
            return
        if len(self._callers) == MAX_CALLERS:
            self._hang_up(next(iter(self._callers)))
        sock.setblocking(False)
        caller = self._callers[sock.fileno()] = Caller(RecordStream(sock, QUESTION_LIMITS))
        self._loop.register(sock.fileno(), partial(self._attend, sock.fileno(), caller))

    def _attend(self, fd: int, caller: Caller) -> None:
        questions, goes_on = caller.stream.receive()
        if not goes_on or len(questions) + caller.asked > 1:
            self._hang_up(fd)
            return
        for question in questions:
            caller.asked = True
            self._callers[fd] = self._callers.pop(fd)
            self._on_question(question["record"], caller)
        self.send(caller)

    def _hang_up(self, fd: int) -> None:
        self._loop.unregister(fd)
        self._callers.pop(fd).stream.socket.close()
