"""The rendezvous: assigns ranks, sees the world complete, hands out addresses, ends barriers.

Every rank keeps one control connection to it for its whole life. Records (one msgpack map a frame):

    rank -> rendezvous                        rendezvous -> rank
                                              attached {rank}    or    refused {message}
    join {world_size, address, versions}      world {addresses}  to all, once all have joined
    beat {state, echoes}, twice a second      echo               if far: I have heard it
    barrier                                   release            to all, once all have called
    failed {failure}                          failure {failure}  to all, the first cause
    doing {doing}                             (what a rank was doing when it was told)
    goodbye                                   (then the rank may hang up)

1. A rank is claimed once, for the whole life of the job. Having said goodbye it may join again;
   worlds come one after the other, and each is complete when all ranks have joined it.
2. The server only takes note and tells its owner by `Event`; the owner decides what a failure is,
   because it may know more (the launcher sees by which signal a process died).
3. Nothing here blocks: the owner's event loop serves it.
4. Another node's launcher connects to the same port, with a number below `ANY_RANK` in place of the
   rank, and is handed to `visit`; the rendezvous does not read what follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from transport.errors import Failure, ProtocolError, printable
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.loop import EventLoop
from transport.rendezvous.world_assembly import Member, WorldAssembly
from transport.sockets.addresses import serve
from transport.sockets.handshake import ANY_RANK, Hello, Role, Verdict
from transport.sockets.listener import Listener
from transport.wire.records import RecordStream

DOING_LIMIT: Final = 200  # characters of what a rank says it is about


class RendezvousServer:
    """Serves one world; see the rules at the top of the file.

    Args:
        world_size: how many ranks the world has.
        secret: the job's secret.
        loop: the owner's, which serves this.
        on_event: told, in the loop's thread, of each thing that happens.
        listening: sockets that listen already; by default a free port at loopback does.
        join_timeout_s: seconds between the first rank's joining and the last one's.
        far: whether ranks are on other hosts, whose clocks say nothing here. Signs of life are
            answered then: so it is known after what moment of ours the next one was made.
        visit: takes the connection of another launcher, and its number.
    """

    def __init__(
        self,
        world_size: int,
        secret: bytes,
        loop: EventLoop,
        on_event: Callable[[Event], None],
        *,
        listening: Sequence[socket.socket] = (),
        join_timeout_s: float = 60.0,
        far: bool = False,
        visit: Callable[[socket.socket, int], None] | None = None,
    ) -> None:
        self.world_size = world_size
        self._loop, self._on_event = loop, on_event
        self._far, self._visit = far, visit
        self._failure: Failure | None = None
        self._members: dict[int, Member] = {}  # the ranks that are connected
        members = self._members.values()
        self._assembly = WorldAssembly(
            world_size, members, self._send, join_timeout_s, loop=loop, on_event=on_event
        )
        self._claimed: set[int] = set()
        self._released = 0
        sockets = list(listening) or [serve("127.0.0.1")]
        self.address: tuple[str, int] = sockets[0].getsockname()[:2]
        self._listener = Listener(secret, Role.CONTROL, ANY_RANK, sockets)
        loop.register(self._listener.fileno(), self._accept)

    def awaited(self) -> list[int]:
        """Return the ranks that have not joined, and that others wait for."""
        return self._assembly.awaited()

    def connected(self, rank: int) -> bool:
        """Whether the rank's control connection is open: if so, it may still have said more."""
        return rank in self._members

    def unclaimed(self) -> list[int]:
        """Return the ranks that have never come."""
        return [rank for rank in range(self.world_size) if rank not in self._claimed]

    def tell_failure(self, failure: Failure) -> None:
        """Tell every rank the first cause, and those that are still to come as well."""
        self._failure = failure
        self._broadcast({"record": "failure", "failure": failure.to_record()})

    def close(self) -> None:
        """Hang up on everyone and stop listening."""
        for member in self._members.values():
            self._loop.unregister(member.stream.socket.fileno())
            member.stream.socket.close()
        self._members.clear()
        self._loop.unregister(self._listener.fileno())
        self._listener.close()

    def _accept(self) -> None:
        for sock, hello in self._listener.poll():
            if hello.rank < ANY_RANK and self._visit is not None:
                self._visit(sock, hello.rank)
            else:
                self._attach(sock, hello)
        self._loop.call_at(self._listener.next_deadline(), self._accept)

    def _attach(self, sock: socket.socket, hello: Hello) -> None:
        free = self.unclaimed()
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
        member = self._members[rank] = Member(rank, stream)
        self._loop.register(sock.fileno(), partial(self._serve, member))
        self._watch(member)
        self._on_event(Event(EventKind.ATTACHED, rank))

    def _refusal(self, rank: int) -> str:
        if 0 <= rank < self.world_size:
            return f"rank {rank} is taken already: was another process started with the same rank?"
        return f"rank {rank} does not exist, or no rank is free, in a world of {self.world_size}"

    def _serve(self, member: Member) -> None:
        with contextlib.suppress(OSError):  # it is gone, but its last words are still to read
            member.stream.flush()
        records, goes_on = member.stream.receive()
        nonsense = member.stream.error
        try:
            for record in records:
                self._handle(member, record)
        except ProtocolError as error:
            nonsense = error
        if nonsense is not None:
            message = f"its control connection sent nonsense: {printable(str(nonsense), 1000)}"
            failure = Failure(member.rank, "lost", message)
            self._on_event(Event(EventKind.FAILED, member.rank, failure))
            goes_on = False
        if goes_on:
            self._watch(member)
        else:
            self._hang_up(member)

    def _hang_up(self, member: Member) -> None:
        self._loop.unregister(member.stream.socket.fileno())
        del self._members[member.rank]
        member.stream.socket.close()
        ended = EventKind.HUNG_UP if member.left else EventKind.LOST
        self._on_event(Event(ended, member.rank))

    def _handle(self, member: Member, record: dict[str, Any]) -> None:
        match record["record"]:
            case "join":
                self._assembly.join(member, record)
            case "barrier":
                member.barriers += 1
                self._release()
            case "failed":
                failure = Failure.from_record(record.get("failure"))
                # Whoever it names: a rank speaks for itself alone.
                failure = dataclasses.replace(failure, rank=member.rank)
                self._on_event(Event(EventKind.REPORTED, member.rank, failure))
            case "beat":
                after, state = member.after_echo(record.get("echoes")), record.get("state")
                if self._far:
                    member.echo()
                    self._send(member, {"record": "echo"})
                self._on_event(Event(EventKind.BEAT, member.rank, state=state, after=after))
            case "doing":
                words = printable(str(record.get("doing", "")), DOING_LIMIT).split()
                self._on_event(Event(EventKind.DOING, member.rank, text=" ".join(words)))
            case "goodbye":
                member.left = True
                self._on_event(Event(EventKind.LEFT, member.rank))
                self._release()
            case other:
                raise ProtocolError(f"there is no record {other!r:.50}")

    def _release(self) -> None:
        """End the barrier that every rank has reached; find the one that some never will."""
        members = self._members.values()
        if self._assembly.worlds == 0 or len(members) < self.world_size:
            return
        while min(member.barriers for member in members) > self._released:
            self._released += 1
            self._broadcast({"record": "release"})
        waiting = sorted(m.rank for m in members if m.barriers > self._released and not m.left)
        gone = sorted(m.rank for m in members if m.barriers == self._released and m.left)
        if waiting and gone:
            message = f"it waits at a barrier, but rank {gone[0]} has left the world without it"
            failure = Failure(waiting[0], "hang", message)
            self._on_event(Event(EventKind.FAILED, waiting[0], failure))

    def _broadcast(self, record: dict[str, Any]) -> None:
        for member in self._members.values():
            self._send(member, record)

    def _send(self, member: Member, record: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is gone: the next poll finds the end of its stream
            member.stream.send(record)
        self._watch(member)

    def _watch(self, member: Member) -> None:
        self._loop.await_room(member.stream.socket.fileno(), member.stream.unsent)
