"""The rendezvous: assigns ranks, sees the world complete, hands out addresses, ends barriers.

Every rank keeps one control connection to it for its whole life. Records (one msgpack map a frame):

    rank -> rendezvous                        rendezvous -> rank
                                              attached {rank}    or    refused {message}
    join {world_size, address}                world {addresses}  to all, once all have joined
    beat {state}, twice a second
    barrier                                   release            to all, once all have called
    failed {failure}                          failure {failure}  to all, the first cause
    doing {doing}                             (what a rank was about when it was told)
    goodbye                                   (then the rank may hang up)

1. A rank is claimed once, for the whole life of the job. Having said goodbye it may join again;
   worlds come one after the other, and each is complete when all ranks have joined it.
2. The server only takes note and tells its owner by `Event`; the owner decides what a failure is,
   because it may know more (the launcher sees by which signal a process died).
3. Nothing here blocks, so the owner can serve it from its own loop: poll `fileno()`, call `poll`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import select
import socket
import time
from typing import Any, Final

from transport.addresses import Address
from transport.errors import Failure, ProtocolError, printable
from transport.handshake import ANY_RANK, Hello, Role, Verdict
from transport.listener import BACKLOG, Listener
from transport.records import RecordStream

DOING_LIMIT: Final = 200  # characters of what a rank says it is about


class EventKind(enum.Enum):
    """What the server tells its owner."""

    ATTACHED = enum.auto()  # the rank has connected
    JOINED = enum.auto()  # the rank has called init()
    COMPLETE = enum.auto()  # all ranks have joined (rank is -1)
    REPORTED = enum.auto()  # the rank reports the failure in `failure`
    FAILED = enum.auto()  # the server itself found the failure in `failure`
    DOING = enum.auto()  # the rank says in `text` what it was about when it was told of a failure
    BEAT = enum.auto()  # the rank lives; `state` is what it says of itself, unchecked
    LEFT = enum.auto()  # the rank said goodbye
    LOST = enum.auto()  # its control connection ended without a goodbye


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened; see `EventKind`."""

    kind: EventKind
    rank: int
    failure: Failure | None = None
    text: str = ""
    state: object = None


@dataclasses.dataclass
class _Member:
    rank: int
    stream: RecordStream
    address: Address | None = None  # where it listens, since it joined for the last time
    joins: int = 0
    barriers: int = 0
    left: bool = False


class RendezvousServer:
    """Serves one world. `poll` does all the work; see the rules at the top of the file.

    Args:
        world_size: how many ranks the world has.
        secret: the job's secret.
        bind, port: where to listen; 0 takes a free port.
        join_timeout_s: seconds between the first rank's joining and the last one's.
    """

    def __init__(
        self,
        world_size: int,
        secret: bytes,
        *,
        bind: str = "127.0.0.1",
        port: int = 0,
        join_timeout_s: float = 60.0,
    ) -> None:
        self.world_size = world_size
        self._join_timeout_s = join_timeout_s
        self._join_deadline: float | None = None
        self._worlds = 0  # how many have been complete
        self._failure: Failure | None = None
        self._members: dict[int, _Member] = {}  # by descriptor
        self._claimed: set[int] = set()
        self._released = 0
        family = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((bind, port), family=family, backlog=BACKLOG)
        self.address: tuple[str, int] = listening.getsockname()[:2]
        self._listener = Listener(secret, Role.CONTROL, ANY_RANK, [listening])
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Return the descriptor that is readable whenever `poll` has something to do."""
        return self._epoll.fileno()

    def next_deadline(self) -> float | None:
        """Return the `time.monotonic()` at which `poll` should be called at the latest."""
        deadlines = (self._join_deadline, self._listener.next_deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def missing(self) -> list[int]:
        """Return the ranks that have not joined the world that is being put together."""
        joined = {m.rank for m in self._members.values() if m.joins > self._worlds}
        return sorted(set(range(self.world_size)) - joined)

    def joining(self) -> bool:
        """Whether a rank waits for the missing ones."""
        return any(member.joins > self._worlds for member in self._members.values())

    def connected(self, rank: int) -> bool:
        """Whether the rank's control connection is open: if so, it may still have said more."""
        return any(member.rank == rank for member in self._members.values())

    def poll(self) -> list[Event]:
        """Serve whoever has something to say, without blocking; return what happened."""
        events: list[Event] = []
        for fd, mask in self._epoll.poll(0):
            member = self._members.get(fd)
            if member is not None:
                self._serve(member, mask, events)
        for sock, hello in self._listener.poll():
            self._attach(sock, hello, events)
        self._check_join_deadline(events)
        return events

    def tell_failure(self, failure: Failure) -> None:
        """Tell every rank the first cause, and those that are still to come as well."""
        self._failure = failure
        self._broadcast({"record": "failure", "failure": failure.to_record()})

    def close(self) -> None:
        """Hang up on everyone and stop listening."""
        for member in self._members.values():
            member.stream.socket.close()
        self._members.clear()
        self._listener.close()
        self._epoll.close()

    def _attach(self, sock: socket.socket, hello: Hello, events: list[Event]) -> None:
        free = [rank for rank in range(self.world_size) if rank not in self._claimed]
        rank = hello.rank if hello.rank != ANY_RANK else (free[0] if free else self.world_size)
        stream = RecordStream(sock)
        try:
            sock.send(bytes([Verdict.ACCEPTED]))
            if rank not in free:
                stream.send({"record": "refused", "message": self._refusal(rank)})
                sock.close()
                return
            stream.send({"record": "attached", "rank": rank})
            if self._failure is not None:
                stream.send({"record": "failure", "failure": self._failure.to_record()})
        except OSError:
            sock.close()
            return
        self._claimed.add(rank)
        member = self._members[sock.fileno()] = _Member(rank, stream)
        self._epoll.register(sock, select.EPOLLIN)
        self._watch(member)
        events.append(Event(EventKind.ATTACHED, rank))

    def _refusal(self, rank: int) -> str:
        if 0 <= rank < self.world_size:
            return f"rank {rank} is taken already: was another process started with the same rank?"
        return f"rank {rank} does not exist, or no rank is free, in a world of {self.world_size}"

    def _serve(self, member: _Member, mask: int, events: list[Event]) -> None:
        if mask & select.EPOLLOUT:
            with contextlib.suppress(OSError):  # it is gone, but its last words are still to read
                member.stream.flush()
        records, goes_on = member.stream.receive()
        nonsense = member.stream.error
        try:
            for record in records:
                self._handle(member, record, events)
        except ProtocolError as error:
            nonsense = error
        if nonsense is not None:
            message = f"its control connection sent nonsense: {printable(str(nonsense), 1000)}"
            failure = Failure(member.rank, "lost", message)
            events.append(Event(EventKind.FAILED, member.rank, failure))
            goes_on = False
        if goes_on:
            self._watch(member)
        else:
            self._hang_up(member, events)

    def _hang_up(self, member: _Member, events: list[Event]) -> None:
        fd = member.stream.socket.fileno()
        self._epoll.unregister(fd)
        del self._members[fd]
        member.stream.socket.close()
        if not member.left:
            events.append(Event(EventKind.LOST, member.rank))

    def _handle(self, member: _Member, record: dict[str, Any], events: list[Event]) -> None:
        match record["record"]:
            case "join":
                self._join(member, record, events)
            case "barrier":
                member.barriers += 1
                self._release(events)
            case "failed":
                failure = Failure.from_record(record.get("failure"))
                # Whoever it names: a rank speaks for itself alone.
                failure = dataclasses.replace(failure, rank=member.rank)
                events.append(Event(EventKind.REPORTED, member.rank, failure))
            case "beat":
                state = record.get("state")
                events.append(Event(EventKind.BEAT, member.rank, state=state))
            case "doing":
                words = printable(str(record.get("doing", "")), DOING_LIMIT).split()
                events.append(Event(EventKind.DOING, member.rank, text=" ".join(words)))
            case "goodbye":
                member.left = True
                events.append(Event(EventKind.LEFT, member.rank))
                self._release(events)
            case other:
                raise ProtocolError(f"there is no record {other!r:.50}")

    def _join(self, member: _Member, record: dict[str, Any], events: list[Event]) -> None:
        if record.get("world_size") != self.world_size:
            message = (
                f"rank {member.rank} wants a world of {record.get('world_size')!r:.20} ranks, "
                f"this one has {self.world_size}"
            )
            self._send(member, {"record": "refused", "message": message})
            return
        if member.joins > self._worlds:
            raise ProtocolError("it joins a world that it has joined already")
        member.address = Address.from_record(record.get("address"))
        member.joins += 1
        member.left = False
        events.append(Event(EventKind.JOINED, member.rank))
        if self._join_deadline is None:
            self._join_deadline = time.monotonic() + self._join_timeout_s
        if not self.missing():
            self._join_deadline = None
            self._worlds += 1
            joined = sorted(self._members.values(), key=lambda m: m.rank)
            addresses = [m.address.to_record() for m in joined if m.address is not None]
            self._broadcast({"record": "world", "addresses": addresses})
            events.append(Event(EventKind.COMPLETE, -1))

    def _check_join_deadline(self, events: list[Event]) -> None:
        if self._join_deadline is None or time.monotonic() < self._join_deadline:
            return
        self._join_deadline = None
        missing = self.missing()
        names = ", ".join(f"rank {rank}" for rank in missing)
        message = (
            f"{self.world_size - len(missing)} of {self.world_size} ranks joined within "
            f"{self._join_timeout_s:g} s; missing: {names}"
        )
        failure = Failure(missing[0], "rendezvous", message)
        events.append(Event(EventKind.FAILED, missing[0], failure))

    def _release(self, events: list[Event]) -> None:
        """End the barrier that every rank has reached; find the one that some never will."""
        members = self._members.values()
        if self._worlds == 0 or len(members) < self.world_size:
            return
        while min(member.barriers for member in members) > self._released:
            self._released += 1
            self._broadcast({"record": "release"})
        waiting = sorted(m.rank for m in members if m.barriers > self._released and not m.left)
        gone = sorted(m.rank for m in members if m.barriers == self._released and m.left)
        if waiting and gone:
            message = f"it waits at a barrier, but rank {gone[0]} has left the world without it"
            failure = Failure(waiting[0], "hang", message)
            events.append(Event(EventKind.FAILED, waiting[0], failure))

    def _broadcast(self, record: dict[str, Any]) -> None:
        for member in self._members.values():
            self._send(member, record)

    def _send(self, member: _Member, record: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is gone: the next poll finds the end of its stream
            member.stream.send(record)
        self._watch(member)

    def _watch(self, member: _Member) -> None:
        events = select.EPOLLIN | (select.EPOLLOUT if member.stream.unsent else 0)
        self._epoll.modify(member.stream.socket, events)
