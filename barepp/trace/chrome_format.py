"""A trace as a file: Chrome trace events, which Perfetto shows and `barepp.timeline` reads back.

The format is "Trace Event Format" (Duca and Sinclair, the Chromium project), as a JSON object:

    "X"       a span ("complete event"): name, cat, ts and dur in microseconds, pid, tid, args
    "s", "f"  the two ends of an arrow ("flow event") with one id; each belongs to the span of its
              pid and tid that encloses its ts, as "bp": "e" says of the end
    "M"       names and order of the rows

    rank 1    | step 3                                                        |
              | waiting for rank 0 | 1F0         | send |        | waiting ...  |
                                                    │ arrow, to the action that used the message
    rank 2      ...                                 └────> | 2F0 |
    rank 2 receives                                  | receive |      copies on a GPU, if any

All times are on rank 0's clock. `otherData` holds the trace as it was recorded, in nanoseconds, for
`barepp.timeline`: the schedule, its sizes, its order, and each rank's spans.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from barepp.program.actions import Action, Kind, order_text
from barepp.program.dependencies import dependencies, result_name
from barepp.schedules import Schedule

FORMAT: Final = "barepp trace 2"
COPY: Final = "copy"
DIRECTIONS: Final = ("send", "receive")
_PID: Final = 0  # one process for the viewer, so that the ranks stand one below the other
KIND_NAMES: Final = frozenset(kind.value for kind in Kind)


class StepSpan(NamedTuple):
    """One step on one rank, from the call of `Pipeline.step` to its loss; in nanoseconds."""

    number: int
    start: int
    end: int


class ActionSpan(NamedTuple):
    """One action and its two messages; None and equal times where nothing crossed ranks."""

    step: int
    action: Action
    source: int | None  # whose message it needed
    to: int | None  # who needed its result
    asked: int  # when it asked for its input
    arrived: int  # when the message was there, or was asked for if it was there before
    start: int
    end: int
    gave: int  # when its result was with the transport


class NoteSpan(NamedTuple):
    """Anything else that took time; `step` is None for what lies between steps."""

    step: int | None
    name: str
    peer: int | None
    start: int
    end: int


class CopySpan(NamedTuple):
    """A copy in a stream of the transport's, on a GPU: beside whatever the rank computes."""

    direction: str  # "send" or "receive"
    nbytes: int
    start: int
    end: int


@dataclasses.dataclass
class RankTrace:
    """What one rank recorded, in the order in which it happened."""

    steps: list[StepSpan]
    actions: list[ActionSpan]
    notes: list[NoteSpan]
    peak_memory_nbytes: int = 0
    copies: list[CopySpan] = dataclasses.field(default_factory=list)

    def shifted(self, at: Callable[[int], int]) -> RankTrace:
        """Return the same with every time as another clock shows it."""
        return RankTrace(
            [StepSpan(number, at(start), at(end)) for number, start, end in self.steps],
            [ActionSpan._make([*span[:4], *map(at, span[4:])]) for span in self.actions],
            [NoteSpan._make([*note[:3], at(note.start), at(note.end)]) for note in self.notes],
            self.peak_memory_nbytes,
            [CopySpan._make([*copy[:2], at(copy.start), at(copy.end)]) for copy in self.copies],
        )

    def to_record(self) -> dict[str, Any]:
        """Return what JSON can carry."""
        actions = [(span.step, str(span.action), *span[2:]) for span in self.actions]
        return {**vars(self), "actions": actions}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RankTrace:
        """Read a record back; LookupError, TypeError or ValueError: it is not one."""
        return cls(
            [StepSpan._make(map(_whole, row)) for row in record["steps"]],
            [
                ActionSpan._make(
                    [_whole(step), Action.parse(text), _or_none(source), _or_none(to)]
                    + [_whole(time) for time in times]
                )
                for step, text, source, to, *times in record["actions"]
            ],
            [
                NoteSpan(_or_none(step), str(name), _or_none(peer), _whole(start), _whole(end))
                for step, name, peer, start, end in record["notes"]
            ],
            _whole(record["peak_memory_nbytes"]),
            [
                CopySpan(str(way), _whole(nbytes), _whole(start), _whole(end))
                for way, nbytes, start, end in record["copies"]
            ],
        )


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is not a whole number")
    return value


def _or_none(value: object) -> int | None:
    return None if value is None else _whole(value)


@dataclasses.dataclass
class Trace:
    """What all ranks recorded, in nanoseconds of rank 0's clock, and what it is of.

    `clock_error_ns` says for each rank how wrong its times can be beside rank 0's.
    """

    schedule: Schedule
    ranks: list[RankTrace]
    clock_error_ns: list[int]


# -- writing --------------------------------------------------------------------------------------


def to_events(trace: Trace) -> dict[str, Any]:
    """Return the trace as the JSON object of a file."""
    origin = min((first for rank in trace.ranks for first in _starts(rank)), default=0)
    events: list[dict[str, Any]] = [_named("process_name", 0, {"name": "barepp"})]
    for number, rank in enumerate(trace.ranks):
        events.append(_named("thread_name", number, {"name": f"rank {number}"}))
        events.append(_named("thread_sort_index", number, {"sort_index": number}))
        events += _spans(number, rank, origin)
        events += _copies(len(trace.ranks) + len(DIRECTIONS) * number, number, rank, origin)
    events += _arrows(trace, origin)
    about = {
        "format": FORMAT,
        "schedule": trace.schedule.name,
        "stages": trace.schedule.num_stages,
        "ranks": trace.schedule.num_ranks,
        "microbatches": trace.schedule.num_microbatches,
        "order": order_text(trace.schedule.order),
        "clock_error_ns": trace.clock_error_ns,
        "recorded": [rank.to_record() for rank in trace.ranks],
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _starts(rank: RankTrace) -> Iterator[int]:
    yield from (step.start for step in rank.steps)
    yield from (span.asked for span in rank.actions)
    yield from (note.start for note in rank.notes)
    yield from (copy.start for copy in rank.copies)


def _named(name: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": _PID, "tid": tid, "ts": 0, "args": args}


def _span(
    row: tuple[int, int], name: str, cat: str, start: int, end: int, **args: object
) -> dict[str, Any]:
    """Return a span in a row, which has a number and begins its clock at an origin."""
    tid, origin = row
    ts, dur = _microseconds(start - origin), _microseconds(end - start)
    where = {"ph": "X", "name": name, "cat": cat, "pid": _PID, "tid": tid}
    return {**where, "ts": ts, "dur": dur, "args": args}


def _copies(first: int, number: int, rank: RankTrace, origin: int) -> Iterator[dict[str, Any]]:
    """Yield rows of their own for a rank's copies: they run beside its actions."""
    for tid, direction in enumerate(DIRECTIONS, first):
        copies = [copy for copy in rank.copies if copy.direction == direction]
        if not copies:
            continue
        yield _named("thread_name", tid, {"name": f"rank {number} {direction}s"})
        yield _named("thread_sort_index", tid, {"sort_index": number})
        for _, nbytes, start, end in copies:
            args = {"rank": number, "direction": direction, "nbytes": nbytes}
            yield _span((tid, origin), f"{direction} {nbytes} bytes", COPY, start, end, **args)


def _spans(tid: int, rank: RankTrace, origin: int) -> Iterator[dict[str, Any]]:
    span = functools.partial(_span, (tid, origin))
    for number, start, end in rank.steps:
        yield span(f"step {number}", "step", start, end, step=number)
    for step, action, source, to, asked, arrived, start, end, gave in rank.actions:
        if source is not None:
            args = {"step": step, "action": str(action), "source": source}
            yield span(f"waiting for rank {source}", "wait", asked, start, **args)
        stage, kind, microbatch = action
        about: dict[str, object] = {"step": step, "stage": stage, "microbatch": microbatch}
        if source is not None:
            about |= {"source": source, "arrived": _microseconds(arrived - origin)}
        yield span(str(action), kind.value, start, end, **about)
        if to is not None:
            args = {"step": step, "action": str(action), "to": to}
            yield span(f"sending to rank {to}", "send", end, gave, **args)
    for note in rank.notes:
        peer = {} if note.peer is None else {"peer": note.peer}
        within = {} if note.step is None else {"step": note.step}
        yield span(note.name, "note", note.start, note.end, **within, **peer)


def _arrows(trace: Trace, origin: int) -> Iterator[dict[str, Any]]:
    """Yield the two ends of the arrow of each message, from its send to the action that used it."""
    for number, (sender, sent, receiver, used) in enumerate(messages(trace)):
        both = {"name": "message", "cat": "message", "id": number, "pid": _PID}
        yield {**both, "ph": "s", "tid": sender, "ts": _microseconds(sent.end - origin)}
        # (Where two clocks are known to the microsecond alone, it may seem to begin before.)
        at = max(used.start, min(sent.end, used.end))
        end = {"ph": "f", "bp": "e", "tid": receiver, "ts": _microseconds(at - origin)}
        yield {**both, **end}


def messages(trace: Trace) -> Iterator[tuple[int, ActionSpan, int, ActionSpan]]:
    """Yield (sender, the action that sent, receiver, the action that used it) for each message.

    One whose other end was not recorded is left out.
    """
    made = {
        (rank, span.step, result_name(span.action)): span
        for rank, recorded in enumerate(trace.ranks)
        for span in recorded.actions
        if span.to is not None
    }
    for receiver, recorded in enumerate(trace.ranks):
        for span in recorded.actions:
            if span.source is None:
                continue
            for need in dependencies(span.action, trace.schedule.num_stages):
                sent = made.get((span.source, span.step, need))
                if sent is not None:
                    yield span.source, sent, receiver, span


def _microseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e3, 3)
