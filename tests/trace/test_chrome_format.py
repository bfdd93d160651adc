"""A trace's file keeps the rules of its format, and comes back as it was."""

from __future__ import annotations

import json

import pytest
from traces import check_format, every_shape, made

from barepp.errors import DataError
from barepp.program.actions import order_text
from barepp.trace.chrome_format import messages, to_events
from barepp.trace.chrome_reader import read_trace


@every_shape
@pytest.mark.parametrize("transfer", [0, 2])
def test_it_keeps_the_rules_and_comes_back(shape, transfer, tmp_path):
    trace = made(*shape, transfer=transfer, sending=400_000 if transfer else 0)
    events = to_events(trace)
    check_format(events)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(events))
    back = read_trace(path)
    assert order_text(back.schedule.order) == order_text(trace.schedule.order)
    assert back == trace


@every_shape
def test_each_message_is_one_arrow_from_its_send_to_its_use(shape):
    trace = made(*shape, transfer=1, sending=100)
    events = to_events(trace)["traceEvents"]
    sends = [event for event in events if event.get("cat") == "send"]
    uses = [
        event for event in events if "source" in event.get("args", {}) and event["cat"] in "FBIW"
    ]
    starts = [event for event in events if event["ph"] == "s"]
    ends = [event for event in events if event["ph"] == "f"]
    assert sorted((e["tid"], e["ts"]) for e in starts) == sorted((e["tid"], e["ts"]) for e in sends)
    assert sorted((e["tid"], e["ts"]) for e in ends) == sorted((e["tid"], e["ts"]) for e in uses)
    for sender, sent, receiver, used in messages(trace):
        assert (sent.to, used.source) == (receiver, sender)
        assert sent.end + 1_000_000 == used.arrived <= used.start


def test_one_row_a_rank_in_order():
    events = to_events(made("gpipe", 3, 2))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {0: "rank 0", 1: "rank 1", 2: "rank 2"}
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1, 2}


def test_an_arrow_with_one_end_is_not_drawn():
    """The last steps of a rank that keeps fewer: nobody sent what it received."""
    trace = made("1f1b", 2, 2)
    trace.ranks[0].actions = [span for span in trace.ranks[0].actions if span.step == 1]
    check_format(to_events(trace))
    assert {used.step for _, _, _, used in messages(trace)} == {1}


def damaged(change):
    data = to_events(made("1f1b", 2, 2))
    change(data)
    return json.dumps(data).encode()


def spoil(key, value):
    return lambda data: data["otherData"].__setitem__(key, value)


def spoil_first(what, place, value):
    def change(data):
        row = list(data["otherData"]["recorded"][0][what][0])
        row[place] = value
        data["otherData"]["recorded"][0][what][0] = row

    return change


WHOLE = damaged(lambda data: None)
WRONG = {
    "nothing": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "text": (b"hello", "is not JSON, or was cut off"),
    "truncated": (WHOLE[: len(WHOLE) // 2], "is not JSON, or was cut off"),
    "bytes": (bytes(range(256)), "is not JSON, or was cut off"),
    "deep": (b"[" * 100_000, "is not JSON, or was cut off"),
    "list": (b"[]", "not a trace of barepp's"),
    "another program's": (b'{"traceEvents": [], "otherData": {"version": "1"}}', "not a trace of"),
    "older": (damaged(spoil("format", "barepp trace 1")), "is a barepp trace 1, this barepp reads"),
    "no spans": (damaged(lambda data: data["otherData"].pop("recorded")), "damaged: KeyError"),
    "no order": (damaged(lambda data: data["otherData"].pop("order")), "damaged: KeyError"),
    "invalid order": (damaged(spoil("order", [["0B0"], []])), "damaged: ScheduleError"),
    "too many ranks": (damaged(spoil("clock_error_ns", [0, 0, 0])), "damaged: ValueError"),
    "too few": (damaged(spoil("recorded", [])), "damaged: ValueError"),
    "no time": (damaged(spoil_first("actions", 6, None)), "damaged: TypeError"),
    "not a number": (damaged(spoil_first("actions", 6, float("nan"))), "damaged: TypeError"),
    "a fraction": (damaged(spoil_first("steps", 1, 0.5)), "damaged: TypeError"),
    "backwards": (damaged(spoil_first("actions", 7, 0)), "damaged: ValueError"),
    "a step backwards": (damaged(spoil_first("steps", 2, 0)), "damaged: ValueError"),
    "a list for a rank": (damaged(spoil_first("actions", 2, [])), "damaged: TypeError"),
    "a list for a step": (damaged(spoil_first("notes", 0, [])), "damaged: TypeError"),
    "a word for a rank": (damaged(spoil_first("notes", 2, "one")), "damaged: TypeError"),
    "a word for a row": (damaged(spoil("recorded", ["one", "two"])), "damaged: TypeError"),
    "no such stage": (damaged(spoil_first("actions", 1, "5F0")), "damaged: ValueError"),
    "no action": (damaged(spoil_first("actions", 1, "F0")), "damaged: ScheduleError"),
    "a time less": (
        damaged(lambda data: data["otherData"]["recorded"][0].update(steps=[[0, 1]])),
        "damaged: TypeError",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_trace_is_one_sentence(wrong, tmp_path):
    content, says = WRONG[wrong]
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_trace(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("X", {"dur": -0.5}),
        ("X", {"dur": 1500.0}),  # longer than what it is nested in, or into the next
        ("X", {"ts": None}),
        ("s", {"id": 1}),
        ("f", {"ts": 1e9}),
        ("f", {"bp": "s"}),
        ("s", {"name": "other"}),
        ("M", {"pid": None}),
    ],
)
def test_the_check_of_the_format_finds_what_is_wrong(kind, change):
    data = to_events(made("gpipe", 4, 2, transfer=1, sending=100))
    event = next(e for e in data["traceEvents"] if e["ph"] == kind and e["name"] != "step 0")
    event |= change
    with pytest.raises(AssertionError):
        check_format(data)
