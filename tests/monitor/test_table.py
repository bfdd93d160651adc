"""What a person sees of a running job: rates, the table, and how it is drawn over itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import time

import pytest
from terminal import Terminal
from transport_worlds import eventually

from barepp.errors import BareppError
from barepp.launch.output import Output
from barepp.launch.status_server import state_of
from barepp.monitor.rates import WINDOW_S, Rates
from barepp.monitor.status import SILENT_S, JobStatus, RankStatus
from barepp.monitor.table import as_object, cut, interval, nbytes, picture, seconds
from barepp.monitor.terminal import Screen, size_of
from barepp.worker.heartbeat import AT_BARRIER, Heartbeat

JOB = JobStatus(4711, "demos/gpipe.py", "shm", 2, 12.34)


def counted(at: float, batches: float, received: int = 0, sent: int = 0, **more) -> RankStatus:
    state = more.pop("state", "computing 0F3")
    return RankStatus(0, None, state, 0.0, 0.1, at, 7, batches, sent, received, **more)


def beat(doing: str, waits_for: tuple[int, ...] | None) -> Heartbeat:
    return Heartbeat(1.0, doing, waits_for, waits_for is not None, {}, {})


# -- the state -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("doing", "waits_for", "state"),
    [
        ("computing 2F5", None, "computing 2F5"),
        ("", None, "in the script's own code"),
        ("waiting for the input of 1F6", (0,), "waiting for the input of 1F6 from rank 0"),
        ("waiting for the loss", (3,), "waiting for the loss from rank 3"),
        ("waiting for a message from rank 1 with tag 0", (1,), None),
        ("", (1,), "waiting for a message from rank 1"),
        ("", (1, 2), "waiting for a message from rank 1 and 2"),
        ("waiting at a barrier", (AT_BARRIER,), "waiting at a barrier"),
    ],
)
def test_a_state_says_what_a_rank_is_about_and_for_whom_it_waits(doing, waits_for, state):
    assert state_of(beat(doing, waits_for)) == (state or doing)


def test_a_status_survives_its_record_and_nonsense_is_an_error():
    status = counted(1.5, 8.0, 100, 200)
    assert RankStatus.from_record(status.to_record()) == status
    assert RankStatus.from_record(RankStatus(1, 2, "starting").to_record()).pid == 2
    assert JobStatus.from_record(JOB.to_record()) == JOB
    for record in (None, {}, [], {**status.to_record(), "steps": "x"}, {"rank": 0}):
        with pytest.raises(BareppError):
            RankStatus.from_record(record)
        with pytest.raises(BareppError):
            JobStatus.from_record(record)


# -- rates -----------------------------------------------------------------------------------------


def test_rates_are_what_was_counted_over_the_ranks_own_seconds():
    readings = Rates(local=False)
    (first,) = readings.take([counted(100.0, 40, 1000, 500)])
    assert first.microbatches_per_s is first.received_per_s is first.sent_per_s is None
    (second,) = readings.take([counted(102.0, 50, 5000, 500)])
    assert (second.microbatches_per_s, second.received_per_s, second.sent_per_s) == (5, 2000, 0)
    (same,) = readings.take([counted(102.0, 50, 5000, 500)])  # no new word of it: no new rate
    assert same.microbatches_per_s == 5


def test_rates_forget_what_is_long_ago_but_always_span_the_window():
    readings = Rates(local=False)
    for tick in range(100):
        per_s = 1 if tick < 50 else 10
        done = sum(0.5 * (1 if t < 50 else 10) for t in range(tick))
        (reading,) = readings.take([counted(tick / 2, done)])
        if tick in (40, 49) or tick > 50 + 2 * WINDOW_S:
            assert reading.microbatches_per_s == pytest.approx(per_s)


def test_a_new_world_counts_from_zero_and_no_rate_is_negative():
    readings = Rates(local=False)
    readings.take([counted(1.0, 100)])
    (reading,) = readings.take([counted(2.0, 3)])
    assert reading.microbatches_per_s is None
    (reading,) = readings.take([counted(3.0, 5)])
    assert reading.microbatches_per_s == 2


def test_what_is_not_known_stays_unknown():
    (reading,) = Rates(local=True).take([RankStatus(0, 2**22 + 1, "starting")])  # no such pid
    assert reading.cpu_percent is reading.rss_nbytes is reading.sent_per_s is None
    (other,) = Rates(local=False).take([RankStatus(0, 1, "starting")])
    assert other.rss_nbytes is None  # process 1 of another namespace is not ours


def test_a_rank_that_says_nothing_is_silent():
    readings = Rates(local=False)
    readings.take([counted(1.0, 4)])
    assert readings.take([counted(2.0, 8)])[0].microbatches_per_s == 4
    (reading,) = readings.take([dataclasses.replace(counted(2.0, 8), silent_s=SILENT_S + 1)])
    assert reading.state == "silent; last heard: computing 0F3"
    assert reading.state_s == SILENT_S + 1
    assert reading.microbatches_per_s is None and reading.status.microbatches == 8


# -- the table -------------------------------------------------------------------------------------


def some_readings(ranks: int = 2):
    readings = Rates(local=False)
    readings.take([counted(1.0, 0)])
    (full,) = readings.take([counted(2.0, 81.25, 1_300_000, 1_048_576)])
    waiting = RankStatus(1, 4713, "waiting for the input of 12F3 from rank 5", 754.0, 0.1)
    return [full, *Rates(local=False).take([waiting] * (ranks - 1))]


def test_the_table_is_aligned_and_says_what_is_known():
    head, header, first, second = picture(JOB, some_readings())
    assert head == "job 4711: demos/gpipe.py, 2 ranks over shm, running for 12.3 s"
    for word in ("steps", "micro/s", "CPU", "memory", "in/s", "out/s"):
        end = header.index(word) + len(word)
        assert all(
            row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in (first, second)
        )
    assert "computing 0F3 " in first and " 81.2 " in first and " 1.2 MiB " in first
    assert "waiting for the input of 12F3 from rank 5  13 min" in second
    assert len({len(header), len(first), len(second)}) == 1


@pytest.mark.parametrize("columns", [20, 80, 100, 130, 200])
def test_no_line_is_wider_than_the_terminal(columns):
    rows = picture(JOB, some_readings(), os.terminal_size((columns, 24)))
    assert all(len(row) <= columns for row in rows)
    if columns >= 80:
        assert "waiting for 12F3 from rank 5" in rows[3].replace("the input of ", "")
    if columns >= 130:
        assert "…" not in "".join(rows) and "out/s" in rows[1]


@pytest.mark.parametrize(("lines", "rows"), [(3, 3), (10, 9), (14, 13), (15, 14), (40, 14)])
def test_no_more_lines_than_the_terminal_has(lines, rows):
    shown = picture(JOB, some_readings(12), os.terminal_size((100, lines)))
    assert len(shown) == rows
    assert (shown[-1] == f"and {14 - rows + 1} more") == (rows < 14)


def test_the_object_holds_every_fact_once():
    found = json.loads(json.dumps(as_object(JOB, some_readings())))
    assert found["job"]["pid"] == 4711
    first, second = found["ranks"]
    assert first["microbatches_per_s"] == 81.25 and first["steps"] == 7
    assert second["state"].startswith("waiting") and second["steps"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1023 * 1024, "1.0 MiB"), (2**50, "1024 TiB")],
)
def test_bytes_for_people(value, text):
    assert nbytes(value) == text


def test_every_number_fits_its_column():
    rng = random.Random(0)
    for _ in range(2000):
        assert len(nbytes(2 ** rng.uniform(0, 50))) <= 8
        assert len(seconds(2 ** rng.uniform(-5, 23))) <= 6
    assert cut("four", 3) == "fo…" and cut("four", 4) == "four"


def test_an_interval_is_a_number_of_seconds():
    assert interval("0.5") == 0.5
    for wrong in ("0", "-1", "nan", "inf", "x", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError, match="seconds, from 0.1"):
            interval(wrong)


# -- drawing ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def a_terminal_that_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


SIZE = os.terminal_size((80, 24))


def test_pictures_of_any_size_are_drawn_over_each_other_and_text_above_them():
    rng = random.Random(1)
    terminal, screen = Terminal(), Screen()
    terminal.write("before\n")
    above = ["before"]
    for number in range(200):
        lines = ["x" * rng.randrange(120) for _ in range(rng.randrange(1, 6))]
        terminal.write(screen.draw(lines, SIZE))
        if rng.randrange(3) == 0:
            terminal.write(screen.above(f"line {number}\n"))
            above.append(f"line {number}")
        seen = [*above, *(line[:80] for line in lines)]
        assert terminal.lines[: len(seen)] == seen and not any(terminal.lines[len(seen) :])
    assert not terminal.cursor_shown
    terminal.write(screen.leave())
    terminal.write("after\n")
    assert terminal.cursor_shown
    assert terminal.shown == [*seen, "after"]


def test_what_a_rank_prints_comes_through_as_it_is():
    """Colours, control characters, long lines, what is no UTF-8: nothing is changed or cut."""
    shown = bytearray()
    raw = (
        b"[rank 0] \x1b[31mred\x1b[0m \x08\x07 10%\r20%\t\xff\xfe [bold] :smile: "
        + b"x" * 300
        + b"\n"
    )
    (reader, writer), (other_reader, other_writer) = os.pipe(), os.pipe()
    os.write(writer, raw.removeprefix(b"[rank 0] "))
    for fd in (writer, other_writer):
        os.close(fd)
    with Output(None, lambda target, data: shown.extend(data)) as output:
        output.show_below(["picture"], SIZE)
        eventually(lambda: b"picture" in shown)
        output.add_rank(0, other_reader, reader)
        eventually(lambda: raw in shown)
        output.let_stand()


def test_a_screen_that_nothing_was_drawn_on_leaves_nothing():
    assert Screen().leave() == ""


def test_a_file_has_no_size(tmp_path):
    with (tmp_path / "file").open("w") as file:
        assert size_of(file.fileno()) is None


def test_on_a_terminal_the_picture_stands_below_all_that_is_printed():
    terminal, size = Terminal(40), os.terminal_size((40, 24))
    with Output(None, lambda target, data: terminal.write(data.decode())) as output:
        output.say("first\n")
        output.show_below(["picture 1", "of a job"], size)
        eventually(lambda: terminal.lines[-2:] == ["picture 1", "of a job"])
        for number in range(5):
            output.say(f"line {number}, {'long ' * 12}\n")
        output.show_below(["picture 2"], size)
        eventually(lambda: terminal.lines[-1] == "picture 2")
        output.let_stand()
        output.say("last\n")
    assert terminal.shown[-2:] == ["picture 2", "last"]
    text = "\n".join(terminal.shown)
    assert text.count("picture") == 1 and text.startswith("first\nline 0") and "line 4" in text


def test_without_rich_pictures_are_printed_one_below_the_other(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.live", None)
    shown = bytearray()
    with Output(None, lambda target, data: shown.extend(data)) as output:
        output.show_below(["picture 0"], SIZE)
        eventually(lambda: shown.endswith(b"picture 0\n\n"))
        output.show_below(["picture 1"], SIZE)
        eventually(lambda: shown.endswith(b"picture 1\n\n"))
        output.let_stand()
        output.say("last\n")
    assert shown == b"picture 0\n\npicture 1\n\nlast\n"


def test_elsewhere_pictures_are_printed_and_only_the_latest_of_several():
    shown: list[bytes] = []

    def slow(target: int, data: bytes) -> None:
        shown.append(data)
        time.sleep(0.05)

    with Output(None, slow) as output:
        for number in range(100):
            output.show_below([f"picture {number}"], None)
        eventually(lambda: shown and shown[-1] == b"picture 99\n\n")
    assert len(shown) < 50 and all(data.endswith(b"\n\n") for data in shown)
