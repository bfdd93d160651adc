"""What a rank reports twice a second: whether it waits, for which ranks, and its traffic so far."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from transport.errors import printable

if TYPE_CHECKING:
    from transport.message.work import Traffic

AT_BARRIER: Final = -1  # stands for all ranks, which a rank at a barrier waits for
OUR_THREADS: Final = "barepp-"  # the names of the threads that no script has started
DOING_LIMIT: Final = 200
IN_SCRIPT: Final = "in the script's own code"  # what a rank does that is in no call of ours


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """One report of a rank.

    Attributes:
        made_at: `time.monotonic()` seconds between the two readings, of who waits and of what
            has moved. Ranks of one host share that clock.
        doing: what it does now, for people.
        waits_for: the ranks that it waits for without a limit, when all its threads do so; None
            when it computes, or may go on by itself.
        blocked: whether any of its threads waits in barepp without a limit, for whatever it is.
        sent, received: messages handed to the transport for each peer, and received from it.
        sent_nbytes, received_nbytes: the payloads of all of these.
        steps, microbatches: training steps that it has done, microbatches that have passed it.
    """

    made_at: float
    doing: str
    waits_for: tuple[int, ...] | None
    blocked: bool
    sent: Mapping[int, int]
    received: Mapping[int, int]
    sent_nbytes: int = 0
    received_nbytes: int = 0
    steps: int = 0
    microbatches: float = 0.0

    def same_state(self, other: Heartbeat) -> bool:
        """Whether nothing has moved between two beats."""
        return dataclasses.replace(self, made_at=other.made_at) == other

    def to_record(self) -> dict[str, object]:
        """Return the beat as a plain map that msgpack takes."""
        return {
            "made_at": self.made_at,
            "doing": self.doing,
            "waits_for": self.waits_for,
            "blocked": self.blocked,
            "sent": list(self.sent.items()),
            "received": list(self.received.items()),
            "totals": [self.sent_nbytes, self.received_nbytes, self.steps, self.microbatches],
        }

    @classmethod
    def from_record(cls, record: Any) -> Heartbeat | None:
        """Read a beat that came over the network; None when it is none."""
        match record:
            case {
                "made_at": float(made_at),
                "doing": str(doing),
                "waits_for": list() | None as waits_for,
                "blocked": bool(blocked),
                "sent": list(sent),
                "received": list(received),
                "totals": [int() as out, int() as into, int() as steps, float() as microbatches],
            } if all(map(_is_count, [*sent, *received])) and all(map(_is_int, waits_for or [])):
                waits = None if waits_for is None else tuple(waits_for)
                words = " ".join(printable(doing, DOING_LIMIT).split())  # one line of a report
                totals = out, into, steps, microbatches
                return cls(made_at, words, waits, blocked, dict(sent), dict(received), *totals)
        return None


def script_threads() -> list[int]:
    """Return the threads of this process that are the script's own."""
    return [t.ident or 0 for t in threading.enumerate() if not t.name.startswith(OUR_THREADS)]


def beat_of(
    doing: str,
    waits_for: Callable[[], Mapping[int, int | None]],
    traffic: Traffic,
    threads: Callable[[], Iterable[int]] = script_threads,
) -> Heartbeat:
    """Return the beat of a rank: of this process, unless its threads are named.

    `waits_for` says for each thread that waits without a limit whom it waits for; None when it is
    for something that may end by itself, as a send does. A thread of the script's own that does
    not wait may do anything, so the rank then counts as busy.
    """
    waits = waits_for()
    whom = {waits.get(thread) for thread in threads()}
    made_at = time.monotonic()
    all_wait = tuple(sorted(peer for peer in whom if peer is not None))
    return Heartbeat(
        made_at,
        doing[:DOING_LIMIT],
        None if None in whom else all_wait,
        bool(waits),
        dict(traffic.sent),
        dict(traffic.received),
        traffic.sent_nbytes,
        traffic.received_nbytes,
    )


def _is_int(value: object) -> bool:
    return type(value) is int


def _is_count(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_int, value))
