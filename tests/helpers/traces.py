"""Traces for tests: made by the simulator, so that all that follows from them is known."""

from __future__ import annotations

from typing import Any

import pytest

from barepp.plan.simulate import Costs, simulate
from barepp.program.lowering import lower
from barepp.schedules import make_schedule
from barepp.trace.chrome_format import ActionSpan, NoteSpan, RankTrace, StepSpan, Trace

MS = 1_000_000
SHAPES = [
    ("naive", 3, 2, None),
    ("gpipe", 4, 3, None),
    ("1f1b", 4, 8, None),
    ("interleaved_1f1b", 6, 3, 3),
    ("zb_h1", 4, 5, None),
    ("zb_v", 6, 4, None),
    ("1f1b", 1, 2, None),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])


def made(
    name: str,
    num_stages: int,
    num_microbatches: int,
    num_ranks: int | None = None,
    *,
    transfer: int = 0,
    sending: int = 0,
    num_steps: int = 2,
) -> Trace:
    """Each F, I and W takes 1 ms, a message `transfer` ms; of an action that sends the last
    `sending` ns are isend's. Every step is like the others, 1 ms after the one before.
    """
    schedule = make_schedule(name, num_stages, num_microbatches, num_ranks)
    timeline = simulate(schedule.order, num_stages, Costs(transfer=transfer))
    length = int(timeline.makespan) * MS
    program = lower(schedule.order, num_stages)
    ranks = [RankTrace([], [], [], 100 << 20) for _ in schedule.order]
    for number in range(num_steps):
        origin = 7_000_000_000 + number * (length + MS)
        ends: dict[Any, int] = {}
        for row in timeline.spans:
            ends |= {span.action: origin + int(span.end) * MS for span in row}
        for rank, (steps, row) in enumerate(zip(program, timeline.spans, strict=True)):
            ranks[rank].steps.append(StepSpan(number, origin, origin + length))
            last = origin
            for (action, source, to), span in zip(steps, row, strict=True):
                start, end = origin + int(span.start) * MS, origin + int(span.end) * MS
                asked = start if source is None else last
                sent = [e for a, e in ends.items() if _feeds(a, action) and source is not None]
                arrived = max(sent) - sending + transfer * MS if sent else start
                computed = end if to is None else end - sending
                times = (asked, arrived, start, computed, end)
                ranks[rank].actions.append(ActionSpan(number, action, source, to, *times))
                last = end
            name_of_all = "waiting for its sends"
            ranks[rank].notes.append(NoteSpan(number, name_of_all, None, last, last))
        for rank in ranks:
            after = origin + length
            rank.notes.append(NoteSpan(None, "optimizer", None, after, after + MS // 2))
    return Trace(schedule, ranks, [0] * len(ranks))


def _feeds(one: Any, other: Any) -> bool:
    """Whether `other` waits for a message of `one`, where both are on different ranks."""
    if one.microbatch != other.microbatch:
        return False
    if other.kind.value == "F":
        return one.kind.value == "F" and one.stage == other.stage - 1
    return other.kind.value in "BI" and one.kind.value in "BI" and one.stage == other.stage + 1


def check_format(data: dict[str, Any]) -> None:
    """Hold a file's object against the rules of the "Trace Event Format" document.

    1. Every event has ph, pid, tid and name; all but metadata have a ts, in microseconds.
    2. A complete event has a duration from 0 up; those of one row are nested or disjoint.
    3. A flow has one start and one end with one id, name and category, the start not later; each
       lies within a complete event of its row, so that there is something to bind to.
    """
    assert isinstance(data["traceEvents"], list)
    assert data["displayTimeUnit"] in ("ms", "ns")
    rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    flows: dict[tuple[Any, str, str], dict[str, dict[str, Any]]] = {}
    for event in data["traceEvents"]:
        assert event["ph"] in ("X", "M", "s", "f"), event
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["name"], str) and event["name"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            continue
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        assert isinstance(event["cat"], str)
        if event["ph"] == "X":
            start, took = round(event["ts"] * 1e3), round(event["dur"] * 1e3)
            assert took >= 0
            rows.setdefault((event["pid"], event["tid"]), []).append((start, start + took))
        else:
            ends = flows.setdefault((event["id"], event["cat"], event["name"]), {})
            assert event["ph"] not in ends, f"id {event['id']} is used twice"
            ends[event["ph"]] = event
    for spans in rows.values():
        open_until: list[int] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1], "spans that overlap"
            open_until.append(end)
    for key, ends in flows.items():
        assert ends.keys() == {"s", "f"}, key
        assert ends["s"]["ts"] <= ends["f"]["ts"]
        assert ends["f"]["bp"] == "e"
        for event in ends.values():
            at = round(event["ts"] * 1e3)
            spans = rows[event["pid"], event["tid"]]
            assert any(start <= at <= end for start, end in spans), key
    assert len({key[0] for key in flows}) == len(flows)
