"""What a launcher knows of its job: each rank, each other node, and what all parts share."""

from __future__ import annotations

import dataclasses
import time

from barepp.launch.hang_detector import HangDetector
from barepp.launch.output import EventLog
from barepp.worker.heartbeat import Heartbeat
from barepp.worker.spec import Options
from transport.errors import Failure
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.loop import EventLoop


@dataclasses.dataclass
class Member:
    """What is known of one rank, wherever its process is.

    Attributes:
        joined, left: whether it is, or has been, in the world, and whether it left in order.
        status: what the process ended with, as soon as that is known.
        ended_at: when its process ended.
        exit_code: the same as `status`, once all that the rank had said has been heard.
        reported: the failure that the rank itself told.
        doing: what it was about when it was told of another rank's failure.
        stacks: its Python stacks before it was told of a hang, or in brackets why there are none.
        killed: whether the launcher killed it.
        cut_off: what it was about when its control connection broke, and nobody had told it a
            failure; None when it has not said so.
    """

    rank: int
    joined: bool = False
    left: bool = False
    status: int | None = None
    ended_at: float = 0.0
    exit_code: int | None = None
    reported: Failure | None = None
    doing: str = ""
    stacks: str = ""
    killed: bool = False
    cut_off: str | None = None


@dataclasses.dataclass
class Host:
    """What is known of another node.

    Attributes:
        ranks: those that its launcher starts.
        come, gone: whether its launcher has come, and whether it has hung up since.
        heard_at: when its launcher has spoken last, in seconds of `time.monotonic()`.
    """

    node: int
    ranks: range
    come: bool = False
    gone: bool = False
    heard_at: float = 0.0


@dataclasses.dataclass
class JobState:
    """One job, as a launcher knows it.

    Attributes:
        options: its limits.
        loop: serves all parts of the launcher.
        watch: what its ranks say of themselves; finds a job that hangs.
        events: its history.
        members: its ranks by number; they may be started one after the other.
    """

    options: Options
    loop: EventLoop
    watch: HangDetector
    events: EventLog = dataclasses.field(default_factory=lambda: EventLog(None))
    members: dict[int, Member] = dataclasses.field(default_factory=dict)

    def note(self, event: Event, *, far: bool = False) -> None:
        """Take note of what a rank has said; `far`: its clock may be another host's."""
        member = self.members[event.rank]
        match event.kind:
            case EventKind.JOINED:
                member.joined, member.left = True, False
            case EventKind.BEAT:
                beat, after = Heartbeat.from_record(event.state), event.after if far else None
                self.watch.beat(member.rank, beat, time.monotonic(), after=after)
            case EventKind.LEFT:
                member.left = True
            case EventKind.DOING:
                member.doing = member.doing or event.text
            case EventKind.REPORTED:
                member.reported = member.reported or event.failure

    def ended(self, rank: int, status: int) -> Member:
        """Take note that a rank's process has ended; what it had said may still be under way."""
        member = self.members[rank]
        member.status, member.ended_at = status, time.monotonic()
        return member

    def write_failure(self, failure: Failure, *, primary: bool) -> None:
        """Write a failure into the history; the first one is the primary one."""
        record = {key: value for key, value in failure.to_record().items() if key != "rank"}
        self.events.write("failed", failure.rank, primary=primary, **record)
