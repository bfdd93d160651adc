"""Finds a job that hangs, from what every rank says of itself twice a second; no clock, no socket.

Three ways to hang, three proofs:

1. Silence. A rank that has said nothing for `heartbeat_s` is stopped, or holds Python's lock.
2. A deadlock. At one moment every rank waits without a limit, and every message that was sent has
   been received: no rank can ever wake another. A rank whose last heartbeats were equal has waited
   at least from the second of them to the last. (Between the first two it may have moved a
   message, because a heartbeat first reads who waits and then the traffic.) The moment is where
   the spans of all ranks overlap.
3. No progress. Some rank waits, and nothing has moved on any rank for `timeout_s`: no message, no
   action. One rank may be busy for ever while the others wait for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from barepp.monitor.status import SILENT_S
from barepp.worker.heartbeat import AT_BARRIER, IN_SCRIPT, Heartbeat
from transport.errors import Failure


@dataclasses.dataclass(frozen=True)
class Said:
    """What a rank has said last; times are `time.monotonic()` seconds.

    `beat` is None from a rank that is in no world; `since` is when it said the same first.
    """

    beat: Heartbeat | None
    since: float
    heard_at: float


class HangDetector:
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
        self._world = frozenset(ranks)
        self._ranks = set(self._world)  # whose processes have not ended
        self._heartbeat_s = heartbeat_s or math.inf
        self._timeout_s = timeout_s or math.inf
        self._state_of = state_of
        self._heard_at: dict[int, float] = {}
        self._beats: dict[int, Heartbeat] = {}  # of the ranks that are in the world
        self._said: dict[int, float] = {}  # when the first of a rank's equal beats was made
        self._since: dict[int, float] = {}  # and the second
        self._until: dict[int, float] = {}  # and the last
        self._moved_at = -math.inf

    def beat(
        self, rank: int, beat: Heartbeat | None, now: float, *, after: float | None = None
    ) -> None:
        """Take a rank's word; None from one that is alive but in no world.

        The clock of another host says nothing here. With `after`, a moment of ours before which the
        beat was not made, the moment of its making is taken as unknown between that and `now`.
        """
        if rank not in self._ranks:
            return
        self._heard_at[rank] = now
        if beat is None:
            self._beats.pop(rank, None)
            return
        made_by = beat.made_at if after is None else now
        self._until[rank] = beat.made_at if after is None else after
        before = self._beats.get(rank)
        if before is None or not beat.same_state(before):
            self._said[rank] = made_by
            self._since[rank] = math.inf
            self._moved_at = now
        elif math.isinf(self._since[rank]):
            self._since[rank] = made_by
        self._beats[rank] = beat

    def said(self, rank: int) -> Said | None:
        """Return what a rank has said last; None when it has ended, or was never heard."""
        heard_at = self._heard_at.get(rank)
        if heard_at is None:
            return None
        return Said(self._beats.get(rank), self._said.get(rank, heard_at), heard_at)

    def heard_at(self, rank: int) -> float:
        """Return when a rank has spoken last; minus infinity if it never has, or has ended."""
        return self._heard_at.get(rank, -math.inf)

    def ended(self, rank: int, at: float) -> str:
        """Stop to watch a rank whose process ended at `at`; return what it had said last.

        A rank that is killed says nothing more: its last beat is what can be known of it.
        """
        self._ranks.discard(rank)
        heard_at = self._heard_at.pop(rank, at)
        beat = self._beats.pop(rank, None)
        return "" if beat is None else f"{_doing(beat)}, {at - heard_at:.1f} s before"

    def next_deadline(self) -> float | None:
        """Return when `check` should be called at the latest; None when nothing is due."""
        due = [at + self._heartbeat_s for at in self._heard_at.values()]
        if self._waiting():
            due.append(self._moved_at + self._timeout_s)
        soonest = min(due, default=math.inf)
        return None if math.isinf(soonest) else soonest

    def check(self, now: float) -> Failure | None:
        """Return the failure if the job hangs, else None. Pass all beats that are here first."""
        silent = [r for r, at in self._heard_at.items() if now - at >= self._heartbeat_s]
        if silent:
            return self._silence(min(silent, key=lambda r: self._heard_at[r]))
        if self._deadlocked():
            message = "a deadlock: every rank waits, and no message is on its way"
            return Failure(-1, "hang", f"{message}\n{self.graph()}")
        if self._waiting() and now - self._moved_at >= self._timeout_s:
            busy = [r for r in sorted(self._beats) if not self._beats[r].blocked]
            message = f"no progress on any rank for {self._timeout_s:g} s\n{self.graph()}"
            if not busy:
                return Failure(-1, "hang", message)
            return Failure(busy[0], "hang", message, doing=self._beats[busy[0]].doing)
        return None

    def graph(self, but: int = -1, now: float = -math.inf) -> str:
        """Return who waits for whom, one line a rank, all but one.

        With `now`, a word that is older than usual is told with its age.
        """
        lines = []
        for rank in sorted(self._beats.keys() - {but}):
            age_s = now - self._heard_at[rank]
            age = f" (as it said {age_s:.1f} s ago)" if age_s > SILENT_S else ""
            lines.append(f"  rank {rank} {self._line(rank)}{age}")
        return "\n".join(lines)

    def _line(self, rank: int) -> str:
        beat = self._beats[rank]
        doing = _doing(beat)
        if beat.waits_for is None:
            return f"is {'blocked' if beat.blocked else 'busy'}: {doing}"
        others = [peer for peer in sorted(beat.waits_for) if peer != AT_BARRIER]
        whom = [f"rank {peer}" for peer in others] or ["all ranks"]
        return f"waits for {' and '.join(whom)}: {doing}"

    def _silence(self, rank: int) -> Failure:
        # What it said last may be long over: that is no position.
        beat, state = self._beats.get(rank), self._state_of(rank)
        heard = f" (last heard: {_doing(beat)})" if beat is not None else ""
        why = f": its process {state}" if state else ""
        graph = f"\n{self.graph(but=rank)}" if self._beats.keys() - {rank} else ""
        message = f"no sign of life for {self._heartbeat_s:g} s{heard}{why}{graph}"
        return Failure(rank, "hang", message)

    def _waiting(self) -> bool:
        return any(beat.blocked for beat in self._beats.values())

    def _deadlocked(self) -> bool:
        beats = self._beats
        if self._world != beats.keys():
            return False  # one that is not in the world, or has ended, may have sent something
        if any(beat.waits_for is None for beat in beats.values()):
            return False
        if all(AT_BARRIER in (beat.waits_for or ()) for beat in beats.values()):
            return False  # all have come: the word that ends the barrier is on its way
        if max(self._since[rank] for rank in beats) > min(self._until[rank] for rank in beats):
            return False  # no moment that all of them speak of
        return all(
            sent == beats[peer].received.get(rank, 0)
            for rank, beat in beats.items()
            for peer, sent in beat.sent.items()
            if peer in beats
        )


def _doing(beat: Heartbeat) -> str:
    return beat.doing or IN_SCRIPT
