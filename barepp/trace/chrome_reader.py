"""Reads a trace's file back; what is written is in chrome_format.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from barepp.errors import DataError
from barepp.program.actions import Action
from barepp.schedules import Schedule
from barepp.trace.chrome_format import FORMAT, RankTrace, Trace


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
    written_as = about.get("format") if isinstance(about, dict) else None
    if str(written_as).startswith("barepp trace ") and written_as != FORMAT:
        raise DataError(f"{path} is a {written_as}, this barepp reads {FORMAT}: write it again")
    if not isinstance(about, dict) or written_as != FORMAT:
        raise DataError(
            f"{path} is JSON, but not a trace of barepp's: write one with a demo's --trace PATH, "
            "or with barepp.write_trace"
        )
    try:
        return _trace_of(about)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} is a trace of barepp's, but damaged: {what}") from error


def _trace_of(about: Mapping[str, Any]) -> Trace:
    order = [[Action.parse(text) for text in row] for row in about["order"]]
    name, stages, microbatches = about["schedule"], about["stages"], about["microbatches"]
    schedule = Schedule(str(name), int(stages), int(about["ranks"]), int(microbatches), order)
    errors = [int(error) for error in about["clock_error_ns"]]
    ranks = [RankTrace.from_record(record) for record in about["recorded"]]
    if not len(ranks) == len(errors) == schedule.num_ranks:
        raise ValueError(f"{schedule.num_ranks} ranks, but facts about {len(ranks)}")
    for rank in ranks:
        for span in rank.actions:
            if not 0 <= span.action.stage < schedule.num_stages:
                raise ValueError(f"{span.action} is of a stage that there is not")
        times = [(s.start, s.end) for s in rank.steps] + [(n.start, n.end) for n in rank.notes]
        for start, end in times + [(copy.start, copy.end) for copy in rank.copies]:
            if end < start:
                raise ValueError(f"a span lasts {end - start} ns")
        for span in rank.actions:
            if not span.asked <= span.start <= span.end <= span.gave:
                raise ValueError(f"the times of {span.action} are not in order")
    return Trace(schedule, ranks, errors)
