"""Puts a world together: takes ranks in until all have joined, then tells each where all are.

Worlds come one after the other: a rank that has left may join again, and each world is complete
when all ranks have joined it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from transport.errors import Failure, ProtocolError, printable
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.loop import EventLoop
from transport.sockets.addresses import Address, local_host
from transport.wire.records import RecordStream


@dataclasses.dataclass
class Member:
    """What the rendezvous knows of a rank that is connected to it.

    Attributes:
        address, versions: where it listens and what it runs, since it joined for the last time.
        joins, barriers: how often it has joined a world, and called for a barrier.
        left: whether it has said goodbye since.
        echoes: when its last signs of life were answered, in seconds of `time.monotonic()`.
        echoed: how many were answered in all.
    """

    rank: int
    stream: RecordStream
    address: Address | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    joins: int = 0
    barriers: int = 0
    left: bool = False
    echoes: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=64))
    echoed: int = 0

    def echo(self) -> None:
        """Take note that its sign of life is answered now."""
        self.echoes.append(time.monotonic())
        self.echoed += 1

    def after_echo(self, number: object) -> float:
        """Return when it was sent the echo of this number, counted from 1; -inf if unknown."""
        if not isinstance(number, int) or not 0 <= self.echoed - number < len(self.echoes):
            return -math.inf
        return self.echoes[number - self.echoed - 1]


class WorldAssembly:
    """The worlds of one job; `worlds` counts those that have been complete.

    `members` is the owner's, and changes as ranks come and go; `send` sends a record to one.
    From the first rank's joining to the last one's there are `join_timeout_s` seconds.
    """

    def __init__(
        self,
        world_size: int,
        members: Collection[Member],
        send: Callable[[Member, dict[str, Any]], None],
        join_timeout_s: float,
        *,
        loop: EventLoop,
        on_event: Callable[[Event], None],
    ) -> None:
        self.worlds = 0
        self._world_size = world_size
        self._members = members
        self._send = send
        self._join_timeout_s = join_timeout_s
        self._loop, self._on_event = loop, on_event
        self._waiting = False  # whether the join timeout of this world has begun

    def missing(self) -> list[int]:
        """Return the ranks that have not joined the world that is being put together."""
        joined = {m.rank for m in self._members if m.joins > self.worlds}
        return [rank for rank in range(self._world_size) if rank not in joined]

    def awaited(self) -> list[int]:
        """Return the missing ranks if another one waits for them."""
        missing = self.missing()
        return missing if len(missing) < self._world_size else []

    def join(self, member: Member, record: dict[str, Any]) -> None:
        """Take a rank in; tell all where the others are when it is the last.

        Raises:
            ProtocolError: the record makes no sense.
        """
        if record.get("world_size") != self._world_size:
            message = (
                f"rank {member.rank} wants a world of {record.get('world_size')!r:.20} ranks, "
                f"this one has {self._world_size}"
            )
            self._send(member, {"record": "refused", "message": message})
            return
        if member.joins > self.worlds:
            raise ProtocolError("it joins a world that it has joined already")
        member.address = Address.from_record(record.get("address"))
        member.versions = checked_versions(record.get("versions"))
        member.joins += 1
        member.left = False
        self._on_event(Event(EventKind.JOINED, member.rank))
        if not self._waiting:
            self._waiting = True
            self._loop.call_at(time.monotonic() + self._join_timeout_s, self._on_timeout)
        if self._fits(member) and not self.missing():
            self._complete()

    def _on_timeout(self) -> None:
        """Find the ranks that have not come in time."""
        self._waiting = False
        missing = self.missing()
        if not missing:
            return  # all are here, but do not fit together, which was told
        names = ", ".join(f"rank {rank}" for rank in missing)
        message = (
            f"{self._world_size - len(missing)} of {self._world_size} ranks joined within "
            f"{self._join_timeout_s:g} s; missing: {names}"
        )
        failure = Failure(missing[0], "rendezvous", message)
        self._on_event(Event(EventKind.FAILED, missing[0], failure))

    def _complete(self) -> None:
        self._waiting = False
        self._loop.call_at(None, self._on_timeout)
        self.worlds += 1
        joined = sorted(self._members, key=lambda m: m.rank)
        addresses = [m.address for m in joined if m.address is not None]
        for member in joined:
            # A rank that is on our host, and does not know by which address others reach that,
            # says "": each of them has reached us by one.
            here = local_host(member.stream.socket)
            book = [address.at(here).to_record() for address in addresses]
            self._send(member, {"record": "world", "addresses": book})
        self._on_event(Event(EventKind.COMPLETE, -1))

    def _fits(self, member: Member) -> bool:
        """Whether it runs what the others run: else results would differ, or worse."""
        for other in self._members:
            joined = other.joins > self.worlds and other is not member
            if joined and (message := difference(member.versions, other.rank, other.versions)):
                failure = Failure(member.rank, "rendezvous", message)
                self._on_event(Event(EventKind.FAILED, member.rank, failure))
                return False
        return True


# The versions of what a rank runs, as it announces them: read with suspicion, and compared.

MAX_NAMES: Final = 16
TEXT_LIMIT: Final = 100  # characters of a name or a version


def checked_versions(record: object) -> dict[str, str]:
    """Read a map from the network of names to versions; None is an empty one.

    Raises:
        ProtocolError: it is something else.
    """
    known = {} if record is None else record
    if not isinstance(known, dict) or len(known) > MAX_NAMES:
        raise ProtocolError(f"not a map of versions: {record!r:.100}")
    if not all(isinstance(text, str) for item in known.items() for text in item):
        raise ProtocolError(f"not a map of versions: {record!r:.100}")
    return {printable(n, TEXT_LIMIT): printable(v, TEXT_LIMIT) for n, v in known.items()}


def difference(mine: Mapping[str, str], rank: int, theirs: Mapping[str, str]) -> str:
    """Say in what `mine` differs from those of another rank; "" when it does not."""
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            return (
                f"it runs {name} {mine[name]}, but rank {rank} runs {name} {theirs[name]}: "
                "all must run the same"
            )
    return ""
