"""What the ranks print: line by line, nothing lost, nothing blocked; pipes without any process."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from barepp.launch import output as output_module
from barepp.launch.output import MAX_LINE_NBYTES, Output, write_to_descriptor

SOON_S = 20.0


class Terminal:
    """Notes what is shown; can be blocked, as a terminal is by Ctrl-S."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, bytes]] = []
        self.free = threading.Event()
        self.free.set()
        self.blocked = threading.Event()

    def write(self, target: int, data: bytes) -> None:
        if not self.free.is_set():
            self.blocked.set()
            assert self.free.wait(SOON_S)
        self.shown.append((target, data))

    def text(self, target: int = 1) -> bytes:
        return b"".join(data for where, data in self.shown if where == target)


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


class Pipes:
    """The writing ends of a rank's stdout and stderr."""

    def __init__(self, output: Output, rank: int) -> None:
        (out_r, self.out), (err_r, self.err) = os.pipe(), os.pipe()
        output.add_rank(rank, out_r, err_r)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.err)


def test_every_line_has_its_rank_in_front(terminal: Terminal, tmp_path: Path) -> None:
    with Output(tmp_path, terminal.write) as output:
        first, second = Pipes(output, 0), Pipes(output, 12)
        os.write(first.out, b"one\ntwo\nthr")
        os.write(second.err, b"\n\xff\x00 no text\n")
        os.write(first.out, b"ee\nno newline at the end")
        first.close()
        second.close()
    assert terminal.text(1) == (
        b"[rank 0] one\n[rank 0] two\n[rank 0] three\n[rank 0] no newline at the end\n"
    )
    assert terminal.text(2) == b"[rank 12] \n[rank 12] \xff\x00 no text\n"
    assert (tmp_path / "rank0.log").read_bytes() == b"one\ntwo\nthree\nno newline at the end"
    assert (tmp_path / "rank12.log").read_bytes() == b"\n\xff\x00 no text\n"


def test_a_line_is_never_torn_by_another_rank(terminal: Terminal) -> None:
    with Output(None, terminal.write) as output:
        ranks = [Pipes(output, rank) for rank in range(4)]

        def print_lines(pipes: Pipes, letter: bytes) -> None:
            for _ in range(200):
                os.write(pipes.out, letter * 50)
                os.write(pipes.out, letter * 50 + b"\n")
            pipes.close()

        threads = [
            threading.Thread(target=print_lines, args=(pipes, bytes([97 + rank])))
            for rank, pipes in enumerate(ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON_S)
    lines = terminal.text().splitlines()
    assert sorted(lines) == sorted(
        b"[rank %d] " % rank + bytes([97 + rank]) * 100 for rank in range(4) for _ in range(200)
    )


def test_a_long_line_is_shown_in_pieces_and_logged_whole(
    terminal: Terminal, tmp_path: Path
) -> None:
    long = b"x" * (3 * MAX_LINE_NBYTES)
    with Output(tmp_path, terminal.write) as output:
        pipes = Pipes(output, 0)
        view = memoryview(long + b"\n")
        while view:
            view = view[os.write(pipes.out, view) :]
        pipes.close()
    lines = terminal.text().splitlines()
    assert b"".join(line.removeprefix(b"[rank 0] ") for line in lines) == long
    assert 2 <= len(lines) <= 10
    assert (tmp_path / "rank0.log").read_bytes() == long + b"\n"


def test_the_last_words_come_before_the_report(terminal: Terminal) -> None:
    """However much a rank had left in its pipes, and whichever pipe is read first."""
    for _ in range(20):
        terminal.shown.clear()
        with Output(None, terminal.write) as output:
            ranks = [Pipes(output, rank) for rank in range(3)]
            for pipes in ranks:
                os.write(pipes.out, b"line\n" * 10_000)
                os.write(pipes.err, b"last words")
                pipes.close()
            output.say("the report\n")
        assert terminal.shown[-1] == (2, b"the report\n")
        assert terminal.text(1).count(b"line\n") == 30_000
        assert terminal.text(2).count(b"last words\n") == 3


def test_a_pipe_that_somebody_else_holds_open_does_not_hold_up_the_end(terminal: Terminal) -> None:
    began = time.monotonic()
    with Output(None, terminal.write) as output:
        pipes = Pipes(output, 0)
        os.write(pipes.out, b"partial")
        output.say("the report\n")
    assert time.monotonic() - began < 0.5
    assert terminal.shown == [(2, b"the report\n"), (1, b"[rank 0] partial\n")]
    pipes.close()


def test_somebody_who_prints_for_ever_does_not_hold_up_the_end(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "FLUSH_TIMEOUT_S", 0.2)
    stop = threading.Event()
    with Output(None, terminal.write) as output:
        pipes = Pipes(output, 0)

        def flood() -> None:
            while not stop.is_set():
                try:
                    os.write(pipes.out, b"y\n" * 10_000)
                except OSError:
                    return

        thread = threading.Thread(target=flood)
        thread.start()
        output.say("the report\n")
        began = time.monotonic()
    assert time.monotonic() - began < 5.0
    assert (2, b"the report\n") in terminal.shown
    stop.set()
    thread.join(SOON_S)
    pipes.close()


def test_a_blocked_terminal_blocks_nobody(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "FLUSH_TIMEOUT_S", 0.1)
    terminal.free.clear()
    output = Output(None, terminal.write)
    pipes = Pipes(output, 0)
    os.write(pipes.out, b"hello\n")
    assert terminal.blocked.wait(SOON_S)
    began = time.monotonic()
    output.say("the report\n")  # returns at once
    late = Pipes(output, 1)
    assert time.monotonic() - began < 1.0
    output.__exit__(None, None, None)  # gives up after the timeout
    assert time.monotonic() - began < 5.0
    terminal.free.set()
    pipes.close()
    late.close()
    output._thread.join(SOON_S)
    assert terminal.shown[0] == (1, b"[rank 0] hello\n")


def test_a_terminal_that_is_closed_does_not_stop_the_pipes(tmp_path: Path) -> None:
    def closed(target: int, data: bytes) -> None:
        raise ValueError("I/O operation on closed file")

    with Output(tmp_path, closed) as output:
        pipes = Pipes(output, 0)
        for _ in range(100):
            os.write(pipes.out, b"x" * 10_000)  # ten times what the pipe holds
        pipes.close()
    assert (tmp_path / "rank0.log").stat().st_size == 1_000_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_does_not_stop_the_pipes(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "rank0.log").symlink_to("/dev/full")
    with Output(tmp_path, terminal.write) as output:
        pipes = Pipes(output, 0)
        os.write(pipes.out, b"still shown\n")
        pipes.close()
    assert terminal.text(1) == b"[rank 0] still shown\n"
    assert (
        terminal.text(2)
        == b"barepp: rank0.log cannot be written any more: No space left on device\n"
    )


def test_the_log_of_a_second_run_replaces_the_first(terminal: Terminal, tmp_path: Path) -> None:
    for text in (b"a first run, with much to say\n", b"a second\n"):
        with Output(tmp_path, terminal.write) as output:
            pipes = Pipes(output, 0)
            os.write(pipes.out, text)
            pipes.close()
            output.write_log(0, "its traceback\n")
    assert (tmp_path / "rank0.log").read_bytes() == b"a second\nits traceback\n"


def test_a_terminal_that_somebody_made_non_blocking_gets_everything() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = os.urandom(1_000_000)
    thread = threading.Thread(target=write_to_descriptor, args=(writer, data))
    thread.start()
    got = bytearray()
    while len(got) < len(data):
        got += os.read(reader, 65536)
    thread.join(SOON_S)
    assert bytes(got) == data
    os.close(reader)
    write_to_descriptor(writer, b"nobody reads: no error")
    os.close(writer)
