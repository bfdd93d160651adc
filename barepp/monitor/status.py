"""What a launcher tells of its job to whoever watches: one record of it, and one of each rank."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from barepp.errors import BareppError


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """A running job. `pid` is its launcher's, `task` its script or function, `age_s` seconds."""

    pid: int
    task: str
    transport: str
    world_size: int
    age_s: float

    def to_record(self) -> dict[str, Any]:
        """Return a map that msgpack takes."""
        return dict(vars(self))

    @classmethod
    def from_record(cls, record: object) -> JobStatus:
        """Read what another process has sent; BareppError when it is something else."""
        match record:
            case {
                "pid": int(pid),
                "task": str(task),
                "transport": str(transport),
                "world_size": int(world_size),
                "age_s": float(age_s),
            }:
                return cls(pid, task, transport, world_size, age_s)
        raise BareppError(f"not what a job says of itself: {record!r:.200}")


@dataclasses.dataclass(frozen=True)
class RankStatus:
    """A rank, as its launcher knows it; None is what that does not know.

    Attributes:
        pid: its process, as the launcher names it.
        state: what it is about, in words.
        state_s: for how many seconds nothing about it has changed.
        silent_s: how many seconds ago it was heard.
        measured_at: when it counted what follows, in seconds of a clock of its own.
        steps, microbatches: training steps done, and microbatches that have passed it.
        sent_nbytes, received_nbytes: payloads handed to the transport, and received from it.
    """

    rank: int
    pid: int | None
    state: str
    state_s: float | None = None
    silent_s: float | None = None
    measured_at: float | None = None
    steps: int | None = None
    microbatches: float | None = None
    sent_nbytes: int | None = None
    received_nbytes: int | None = None

    def to_record(self) -> dict[str, Any]:
        """Return a map that msgpack takes."""
        return dict(vars(self))

    @classmethod
    def from_record(cls, record: object) -> RankStatus:
        """Read what another process has sent; BareppError when it is something else."""
        match record:
            case {
                "rank": int(rank),
                "pid": int() | None as pid,
                "state": str(state),
                "state_s": float() | None as state_s,
                "silent_s": float() | None as silent_s,
                "measured_at": float() | None as measured_at,
                "steps": int() | None as steps,
                "microbatches": float() | None as microbatches,
                "sent_nbytes": int() | None as sent,
                "received_nbytes": int() | None as received,
            }:
                known = state_s, silent_s, measured_at, steps, microbatches, sent, received
                return cls(rank, pid, state, *known)
        raise BareppError(f"not what a rank is said to be about: {record!r:.200}")


SILENT_S: Final = 2.5  # longer than a rank is usually silent, which speaks twice a second
