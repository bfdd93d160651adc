"""What the rendezvous tells its owner, who decides what it means."""

from __future__ import annotations

import dataclasses
import enum
import math

from transport.errors import Failure


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
    HUNG_UP = enum.auto()  # its control connection ended after that
    LOST = enum.auto()  # its control connection ended without a goodbye


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened; see `EventKind`.

    `after` is a moment of this host's clock before which a beat was not made; -inf: nobody knows.
    """

    kind: EventKind
    rank: int
    failure: Failure | None = None
    text: str = ""
    state: object = None
    after: float = -math.inf
