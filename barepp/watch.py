"""Finds a job that hangs, from what every rank says of itself twice a second; no clock, no socket.

Three ways to hang, three proofs:

1. Silence. A rank that has said nothing for `heartbeat_s` is stopped, or holds Python's lock.
2. A deadlock. Every rank waits without a limit, nothing is on its way between any two of them, and
   all of them have said so twice: nobody can ever wake anybody. Reported at once.
3. No progress. Nothing has moved on any rank for `timeout_s`: no message, no action, no step. One
   rank may be busy for ever while the others wait for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from transport.errors import Failure

AT_BARRIER = -1  # who a rank waits for that waits at a barrier: everyone


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        doing: what it is about, for people.
        waits_for: the ranks that it waits for without a limit; None when it computes, or may go on
            by itself.
        sent, received: messages handed to each peer's connection, and come in from it.
        progress: grows whenever anything moves.
    """

    doing: str
    waits_for: tuple[int, ...] | None
    sent: Mapping[int, int]
    received: Mapping[int, int]
    progress: int

    def to_record(self) -> dict[str, object]:
        """Return the beat as a plain map that msgpack takes."""
        return {
            "doing": self.doing[:200],
            "waits_for": self.waits_for,
            "sent": list(self.sent.items()),
            "received": list(self.received.items()),
            "progress": self.progress,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Beat:
        """Read a beat that came over the network; ValueError when it is not one."""
        match record:
            case {
                "doing": str(doing),
                "waits_for": list() | None as waits_for,
                "sent": list(sent),
                "received": list(received),
                "progress": int(progress),
            }:
                waits = None if waits_for is None else tuple(int(rank) for rank in waits_for)
                return cls(doing, waits, dict(sent), dict(received), progress)
        raise ValueError(f"not a beat: {record!r:.100}")

    def same_state(self, other: Beat) -> bool:
        """Whether nothing has moved between two beats, both of them waiting."""
        return (
            self.waits_for is not None
            and self.waits_for == other.waits_for
            and self.sent == other.sent
            and self.received == other.received
            and self.progress == other.progress
        )


class Watch:
    """Watches the ranks of one job. Times are `time.monotonic()` seconds that the caller passes.

    Args:
        ranks: who is watched.
        heartbeat_s: how long a rank may be silent.
        timeout_s: how long the whole job may stand still; 0 for ever.
        state_of: tells a rank's process state in words, "" when there is nothing to tell.
    """

    def __init__(
        self,
        ranks: Iterable[int],
        heartbeat_s: float,
        timeout_s: float,
        state_of: Callable[[int], str] = lambda rank: "",
    ) -> None:
        self._ranks = set(ranks)
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s or math.inf
        self._state_of = state_of
        self._beats: dict[int, Beat] = {}
        self._steady: dict[int, bool] = {}  # whether the last two beats were the same, and waiting
        self._heard_at: dict[int, float] = {}
        self._moved_at = -math.inf

    def beat(self, rank: int, beat: Beat, now: float) -> None:
        """Take a rank's word. The first one starts its watch."""
        before = self._beats.get(rank)
        self._steady[rank] = before is not None and beat.same_state(before)
        if before is None or beat.progress != before.progress:
            self._moved_at = now
        self._beats[rank] = beat
        self._heard_at[rank] = now

    def ended(self, rank: int) -> None:
        """Stop to watch a rank: its process has ended, or it has left."""
        self._ranks.discard(rank)
        self._heard_at.pop(rank, None)
        self._beats.pop(rank, None)

    def next_deadline(self) -> float:
        """Return when `check` should be called at the latest; infinity when nothing is due."""
        due = [at + self._heartbeat_s for at in self._heard_at.values()]
        return min([*due, self._moved_at + self._timeout_s] if self._beats else due, default=math.inf)

    def check(self, now: float) -> Failure | None:
        """Return the failure if the job hangs, else None. Take in all beats that are here first."""
        silent = [r for r, at in self._heard_at.items() if now - at >= self._heartbeat_s]
        if silent:
            rank = min(silent, key=lambda r: self._heard_at[r])
            return self._silence(rank)
        if self._deadlocked():
            message = "a deadlock: every rank waits and nothing is on its way"
            return Failure(-1, "hang", f"{message}\n{self.graph()}")
        if self._beats and now - self._moved_at >= self._timeout_s:
            busy = [r for r in sorted(self._beats) if self._beats[r].waits_for is None]
            message = f"no progress on any rank for {self._timeout_s:g} s"
            return Failure(busy[0] if busy else -1, "hang", f"{message}\n{self.graph()}")
        return None

    def graph(self) -> str:
        """Return who waits for whom, one line a rank."""
        return "\n".join(f"  rank {rank}: {self._line(rank)}" for rank in sorted(self._beats))

    def _line(self, rank: int) -> str:
        beat = self._beats[rank]
        doing = beat.doing or "in the script's own code"
        if beat.waits_for is None:
            return f"busy, {doing}"
        whom = "all ranks" if AT_BARRIER in beat.waits_for else _names(beat.waits_for)
        return f"waits for {whom} ({doing})"

    def _silence(self, rank: int) -> Failure:
        state = self._state_of(rank)
        why = f": its process {state}" if state else ""
        beat = self._beats.get(rank)
        message = f"no sign of life for {self._heartbeat_s:g} s{why}\n{self.graph()}"
        return Failure(rank, "hang", message, doing=beat.doing if beat is not None else "")

    def _deadlocked(self) -> bool:
        if not self._ranks or self._ranks != self._beats.keys():
            return False
        if not all(self._steady[rank] for rank in self._ranks):
            return False
        if all(beat.waits_for == (AT_BARRIER,) for beat in self._beats.values()):
            return False  # the last word of the barrier is on its way
        return all(
            sent == self._beats[peer].received.get(rank, 0)
            for rank, beat in self._beats.items()
            for peer, sent in beat.sent.items()
            if peer in self._beats
        )


def _names(ranks: Iterable[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in sorted(ranks))
