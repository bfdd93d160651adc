"""The state of a job and of its ranks, as records that a launcher sends to other processes."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, TypeVar, get_type_hints

from barepp.errors import BareppError

Self = TypeVar("Self", bound="_Record")


class _Record:
    """What a launcher sends to other processes as a map; the field's types say what is right."""

    def to_record(self) -> dict[str, Any]:
        """Return a map that msgpack takes."""
        return dict(vars(self))

    @classmethod
    def from_record(cls: type[Self], record: object) -> Self:
        """Read what another process has sent; BareppError when it is something else."""
        if isinstance(record, dict):
            values = {name: record.get(name, ...) for name in cls.__annotations__}
            kinds = get_type_hints(cls)
            if all(isinstance(value, kinds[name]) for name, value in values.items()):
                return cls(**values)
        raise BareppError(f"not the {cls.__name__} of a job: {record!r:.200}")


@dataclasses.dataclass(frozen=True)
class JobStatus(_Record):
    """A running job. `pid` is its launcher's, `task` its script or function, `age_s` seconds."""

    pid: int
    task: str
    transport: str
    world_size: int
    age_s: float


@dataclasses.dataclass(frozen=True)
class RankStatus(_Record):
    """A rank, as its launcher knows it; None is what that does not know.

    Attributes:
        pid: its process, as the launcher names it.
        state: what it does, in words.
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


SILENT_S: Final = 2.5  # longer than a rank is usually silent, which speaks twice a second
