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

All times are on rank 0's clock. Besides the names, `args` say everything as data, and `otherData`
what the trace is of: the schedule, its sizes, its order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from barepp.actions import Action, Kind, order_text
from barepp.dependencies import dependencies, result_name
from barepp.errors import DataError
from barepp.schedules import Schedule

FORMAT: Final = "barepp trace 1"
_PID: Final = 0  # one process for the viewer, so that the ranks stand one below the other
_KIND_NAMES: Final = frozenset(kind.value for kind in Kind)


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


@dataclasses.dataclass
class RankTrace:
    """What one rank recorded, in the order in which it happened."""

    steps: list[StepSpan]
    actions: list[ActionSpan]
    notes: list[NoteSpan]
    peak_memory_nbytes: int = 0


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
    events += _arrows(trace, origin)
    about = {
        "format": FORMAT,
        "schedule": trace.schedule.name,
        "stages": trace.schedule.num_stages,
        "ranks": trace.schedule.num_ranks,
        "microbatches": trace.schedule.num_microbatches,
        "order": order_text(trace.schedule.order),
        "peak_memory_nbytes": [rank.peak_memory_nbytes for rank in trace.ranks],
        "clock_error_ns": trace.clock_error_ns,
        "origin_ns": origin,
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _starts(rank: RankTrace) -> Iterator[int]:
    yield from (step.start for step in rank.steps)
    yield from (span.asked for span in rank.actions)
    yield from (note.start for note in rank.notes)


def _named(name: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": _PID, "tid": tid, "ts": 0, "args": args}


def _spans(tid: int, rank: RankTrace, origin: int) -> Iterator[dict[str, Any]]:
    def span(name: str, cat: str, start: int, end: int, **args: object) -> dict[str, Any]:
        ts, dur = _microseconds(start - origin), _microseconds(end - start)
        where = {"ph": "X", "name": name, "cat": cat, "pid": _PID, "tid": tid}
        return {**where, "ts": ts, "dur": dur, "args": args}

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
        end = {"ph": "f", "bp": "e", "tid": receiver, "ts": _microseconds(used.start - origin)}
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


# -- reading --------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> Trace:
    """Read a file that `to_events` gave.

    Raises:
        DataError: there is no such file, or it is not a whole trace of ours; one sentence.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty: a run that has not ended well has not written its trace")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON, or was cut off: {error}") from error
    about = data.get("otherData") if isinstance(data, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise DataError(
            f"{path} is JSON, but not a trace of barepp's: write one with a demo's --trace PATH, "
            "or with barepp.write_trace"
        )
    try:
        return _from_events(data["traceEvents"], about)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} is a trace of barepp's, but damaged: {what}") from error


def _from_events(events: list[Mapping[str, Any]], about: Mapping[str, Any]) -> Trace:
    order = [[Action.parse(text) for text in row] for row in about["order"]]
    name, stages, microbatches = about["schedule"], about["stages"], about["microbatches"]
    schedule = Schedule(str(name), int(stages), int(about["ranks"]), int(microbatches), order)
    errors = [int(error) for error in about["clock_error_ns"]]
    ranks = [RankTrace([], [], [], int(peak)) for peak in about["peak_memory_nbytes"]]
    if not len(ranks) == len(errors) == schedule.num_ranks:
        raise ValueError(f"{schedule.num_ranks} ranks, but facts about {len(ranks)}")
    trace = Trace(schedule, ranks, errors)
    spans = [_read_span(event, int(about["origin_ns"])) for event in events if event["ph"] == "X"]
    asked = {(s.tid, *s.key): s.start for s in spans if s.cat == "wait"}
    sent = {(s.tid, *s.key): (int(s.args["to"]), s.end) for s in spans if s.cat == "send"}
    for span in spans:
        rank = ranks[span.tid]
        if span.cat == "step":
            rank.steps.append(StepSpan(int(span.args["step"]), span.start, span.end))
        elif span.cat == "note":
            step, peer = _whole_or_none(span.args, "step"), _whole_or_none(span.args, "peer")
            rank.notes.append(NoteSpan(step, span.name, peer, span.start, span.end))
        elif span.cat in _KIND_NAMES:
            place = (span.tid, *span.key)
            rank.actions.append(_read_action(span, asked.get(place), sent.get(place), stages))
    return trace


class _Span(NamedTuple):
    """A span of the file, its times in nanoseconds."""

    name: str
    cat: str
    tid: int
    start: int
    end: int
    arrived: int
    args: Mapping[str, Any]

    @property
    def key(self) -> tuple[int, str]:
        """The step and the action that it belongs to."""
        return int(self.args["step"]), str(self.args.get("action", self.name))


def _read_span(event: Mapping[str, Any], origin: int) -> _Span:
    args = event["args"]
    start, took = _nanoseconds(event["ts"]) + origin, _nanoseconds(event["dur"])
    arrived = _nanoseconds(args["arrived"]) + origin if "arrived" in args else start
    name, cat, tid = str(event["name"]), str(event["cat"]), int(event["tid"])
    if took < 0 or tid < 0:
        raise ValueError(f"the span {name!r} of row {tid} lasts {took} ns")
    return _Span(name, cat, tid, start, start + took, arrived, args)


def _read_action(
    span: _Span, asked: int | None, sent: tuple[int, int] | None, num_stages: int
) -> ActionSpan:
    action = Action(int(span.args["stage"]), Kind(span.cat), int(span.args["microbatch"]))
    if not 0 <= action.stage < num_stages:
        raise ValueError(f"{action} is of a stage that there is not")
    to, gave = sent or (None, span.end)
    asked = span.start if asked is None else asked
    step, source = int(span.args["step"]), _whole_or_none(span.args, "source")
    times = (asked, span.arrived, span.start, span.end, gave)
    return ActionSpan(step, action, source, to, *times)


def _whole_or_none(args: Mapping[str, Any], name: str) -> int | None:
    return None if args.get(name) is None else int(args[name])


def _nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1e3)
