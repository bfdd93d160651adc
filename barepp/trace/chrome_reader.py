"""Reads a trace's file back; what is written is in chrome_format.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from barepp.errors import DataError
from barepp.program.actions import Action, Kind
from barepp.schedules import Schedule
from barepp.trace.chrome_format import (
    COPY,
    FORMAT,
    KIND_NAMES,
    ActionSpan,
    CopySpan,
    NoteSpan,
    RankTrace,
    StepSpan,
    Trace,
)


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
        if span.cat == COPY:  # in a row of its own
            copy = CopySpan(str(span.args["direction"]), int(span.args["nbytes"]), *span.times)
            ranks[int(span.args["rank"])].copies.append(copy)
            continue
        rank = ranks[span.tid]
        if span.cat == "step":
            rank.steps.append(StepSpan(int(span.args["step"]), span.start, span.end))
        elif span.cat == "note":
            step, peer = _whole_or_none(span.args, "step"), _whole_or_none(span.args, "peer")
            rank.notes.append(NoteSpan(step, span.name, peer, span.start, span.end))
        elif span.cat in KIND_NAMES:
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
    def times(self) -> tuple[int, int]:
        """From when to when."""
        return self.start, self.end

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
