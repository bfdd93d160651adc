"""Every rank's stack in a job that goes on: as often as one likes, and to the same bits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest
from jobs import ROOT, assert_nothing_left, launching, run_job, watched_job
from transport_worlds import SOON_S, eventually, start

from barepp.errors import JobEnded
from barepp.monitor.stacks import (
    LOCKED_S,
    PATIENCE_S,
    StackPipe,
    StackRound,
    process_state,
    take_stacks,
)
from barepp.monitor.stacks import _of_the_script as of_the_script
from barepp.monitor.status import SILENT_S
from barepp.monitor.status_socket import StatusSocket
from barepp.stacks import main
from transport.rendezvous.loop import EventLoop


def test_the_frames_around_the_scripts_own_are_left_out() -> None:
    script = '  File "/somewhere/train.py", line 12 in <module>'
    thread = f"""Current thread 0x00007f0000000000 (most recent call first):
  File "{ROOT}/transport/message/work.py", line 80 in wait
  File "{ROOT}/barepp/worker/world.py", line 90 in recv
{script}
  File "<frozen runpy>", line 88 in _run_code
  File "{ROOT}/barepp/worker/main.py", line 70 in run
"""
    assert of_the_script(thread) == script
    assert of_the_script(thread.replace(f"{script}\n", "")) == ""


EVERYWHERE = """
    import ctypes, hashlib, os, signal, time
    import torch, barepp

    with barepp.init() as world:
        world.barrier()
        if world.rank == 0:
            world.recv(1)  # waits
        elif world.rank == 1:
            def work(): hashlib.scrypt(b"", salt=b"", n=2**14, r=8, p=1)
            while not os.path.exists("{go}"): work()  # computes
            world.send(torch.ones(1), 0)
        elif world.rank == 2:
            fifo, read = os.open("{fifo}", os.O_RDWR), ctypes.CDLL(None).read
            print("read", read(fifo, ctypes.create_string_buffer(1), 1))  # reads in C
        elif world.rank == 3:
            began = time.monotonic()
            time.sleep(6)  # sleeps
            print("slept", time.monotonic() - began >= 6)
        else:
            os.kill(os.getpid(), signal.SIGSTOP)
"""
WHERE = ["# waits", "# computes", "# reads in C", "# sleeps"]


def test_every_rank_tells_where_it_is_wherever_it_is_and_goes_on(tmp_path, capsys):
    go, fifo = tmp_path / "go", tmp_path / "fifo"
    os.mkfifo(fifo)
    text = EVERYWHERE.replace("{go}", str(go)).replace("{fifo}", str(fifo))
    lines = text.splitlines()
    with watched_job(tmp_path, text, 5, heartbeat_s=60.0) as job:
        pids = [rank.pid or 0 for rank in job.line.status()[1]]
        eventually(lambda: "is stopped" in process_state(pids[4]))
        said = [
            f"rank {rank} {what}" for rank, what in enumerate(["waits for rank 1", *3 * ["is"]])
        ]
        eventually(lambda: all(words in job.line.stacks()[0] for words in said))
        for _ in range(5):
            graph, stacks = job.line.stacks()
            for rank, mark in enumerate(WHERE):
                [number] = [i for i, line in enumerate(lines, 1) if line.endswith(mark)]
                assert f'script.py", line {number} in <module>' in stacks[rank]
                assert stacks[rank].count("<module>") == 1, stacks[rank]  # our threads are left out
            assert stacks[4] == "(it is stopped (SIGSTOP, or a terminal))"
            assert "rank 1 is busy: in the script's own code" in graph
        assert main([str(os.getpid())]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("barepp: where every rank is:\n  rank 0 waits for rank 1: ")
        for rank in range(5):
            assert f"barepp: the Python stack of rank {rank}:\n" in shown
        go.touch()
        fifo.write_bytes(b"x")
        os.kill(pids[4], signal.SIGCONT)
    ended = job.finish()
    assert ended.code == 0, ended.report
    assert ended.said(2) == ["read 1"]  # not -1 and EINTR
    assert ended.said(3) == ["slept True"]


KEEPING_THE_LOCK = """
    import barepp, ctypes, faulthandler, os, signal

    # C functions that are called with Python's lock held, and do not let go of it.
    read = ctypes.PyDLL(None).read
    with barepp.init() as world:
        fifo = os.open(f"{fifo}{world.rank}", os.O_RDWR)
        if world.rank == 1:
            faulthandler.unregister(signal.SIGQUIT)
        world.barrier()
        print("read", read(fifo, ctypes.create_string_buffer(1), 1))
"""


def test_a_rank_that_keeps_the_lock_tells_unless_the_signal_would_end_it(tmp_path):
    fifos = [tmp_path / f"fifo{rank}" for rank in range(2)]
    for fifo in fifos:
        os.mkfifo(fifo)
    text = KEEPING_THE_LOCK.replace("{fifo}", str(tmp_path / "fifo"))
    with watched_job(tmp_path, text, heartbeat_s=60.0) as job:
        eventually(lambda: all((rank.silent_s or 0) > SILENT_S for rank in job.line.status()[1]))
        stacks = job.line.stacks()[1]
        assert 'script.py", line 11 in <module>' in stacks[0], stacks
        assert "does not catch SIGQUIT any more" in stacks[1], stacks
        for fifo in fifos:
            fifo.write_bytes(b"x")
    ended = job.finish()
    assert ended.code == 0, ended.report
    assert ended.said(0) == ended.said(1) == ["read 1"]


TRAIN = """
    import os, time
    import torch, barepp
    with barepp.init() as world:
        pipe = barepp.Pipeline(
            world, barepp.mlp(5, 16), torch.nn.functional.cross_entropy, schedule="1f1b"
        )
        generator = torch.Generator().manual_seed(0)
        for step in range(30):
            while step == 15 and not os.path.exists("{go}"):
                time.sleep(0.001)
            pipe.zero_grad()
            inputs = torch.randn(32, 64, generator=generator)
            pipe.step(inputs, torch.arange(32) % 10)
            with torch.no_grad():
                for parameter in pipe.parameters():
                    parameter -= 0.1 * parameter.grad
        print(pipe.parameters_sha256())
"""


def test_a_training_that_is_asked_all_the_time_has_the_same_bits(tmp_path):
    go = tmp_path / "go"
    script = TRAIN.replace("{go}", str(go))
    told = 0
    with watched_job(tmp_path, script) as job, contextlib.suppress(JobEnded):
        while True:
            told += sum("script.py" in text for text in job.line.stacks()[1].values())
            if told > 10:
                go.touch()
    ended = job.finish()
    assert ended.code == 0, ended.report
    undisturbed = run_job(tmp_path, script)
    assert ended.said(0) == ended.said(1) == undisturbed.said(0) != []


def test_sigquit_to_the_launcher_prints_the_stacks_and_ends_nothing(tmp_path: Path) -> None:
    """In a terminal Ctrl-\\ reaches the launcher's whole group, also while the ranks start."""
    go = tmp_path / "go"
    script = f"""
        import barepp, os, time
        with barepp.init() as world:
            world.barrier()
            print("ready", flush=True)
            while not os.path.exists("{go}"):
                time.sleep(0.01)
    """
    with launching(tmp_path, script, "--world", "2") as running:
        eventually(lambda: len(running.processes()) >= 2)  # it catches the signal by now
        os.killpg(running.process.pid, signal.SIGQUIT)
        running.wait_for_line("ready", 2)
        assert running.process.stderr is not None
        for _ in range(2):
            os.killpg(running.process.pid, signal.SIGQUIT)
            for rank in range(2):  # (what was asked for while they started may tell of no line)
                line = "nothing"
                while 'script.py", line ' not in line:
                    assert line, f"no stack of rank {rank}"
                    line = running.process.stderr.readline().decode()
        go.touch()
        ended = running.finish()
        assert_nothing_left(running)
    assert ended.code == 0, ended.err


# -- the pipe, by itself ---------------------------------------------------------------------------


SLEEP = 'print("ready", flush=True); time.sleep(1000)'
# On one line, so that a stack is always the same. (A signal ends the sleep.)
KEEP_THE_LOCK = "while libc.puts(b'ready') + libc.fflush(None) + libc.sleep(1000) >= 0: pass"


class Process:
    """A process that can write its stacks to a pipe, does what `before` says, then `at_last`.

    When it is here, it has written "ready". With KEEP_THE_LOCK no other of its threads runs then.
    """

    def __init__(self, before: str = "", at_last: str = SLEEP, first: str = "") -> None:
        asking, asked = (end.detach() for end in socket.socketpair())
        handlers, writing = os.pipe()
        lines = [
            "import ctypes, os, signal, sys, threading, time",
            "from barepp.monitor.stacks import tell_stacks",
            "libc = ctypes.PyDLL(None)  # its functions are called with Python's lock held",
            "sys.setswitchinterval(1000)" if at_last == KEEP_THE_LOCK else "",
            first,
            f"asked, handlers = {asked}, {writing}",
            "tell_stacks(asked, handlers)",
            textwrap.dedent(before),
            at_last,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)],
            pass_fds=[asked, writing],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        os.close(asked)
        os.close(writing)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.pipe = StackPipe(asking, handlers, self.process.pid)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        eventually(lambda: "is stopped" in process_state(self.process.pid))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.pipe.close()


def run_round(process: Process, now: float = 0.0) -> str:
    asked = StackRound({0: process.pipe, 1: None}, now)
    eventually(lambda: asked.advance(now))
    assert asked.told[1] == "(it has ended)"
    return asked.told[0]


def test_ctrl_c_ends_the_wait_for_a_launcher_that_does_not_answer(capsys):
    asked: list[str] = []

    loop = EventLoop()

    def interrupt() -> None:
        while not asked:
            loop.turn()
        os.kill(os.getpid(), signal.SIGINT)

    with contextlib.closing(StatusSocket(loop, lambda question, _: asked.append(question))):
        interrupted = start(interrupt)
        assert main([str(os.getpid())]) == 130
        interrupted.result(SOON_S)
    loop.close()
    assert capsys.readouterr() == ("", "")


def test_each_round_tells_what_is_true_now():
    with Process() as process:
        first = run_round(process)
        assert first == run_round(process) != ""
        process.stop()
        assert run_round(process) == "(it is stopped (SIGSTOP, or a terminal))"
        process.process.send_signal(signal.SIGCONT)
        eventually(lambda: "is stopped" not in process_state(process.process.pid))
        assert run_round(process) == first
        process.process.kill()
        process.process.wait()
        assert run_round(process) == "(it has ended)"


DEEP = """
    def deep(n):
        if n:
            deep(n - 1)
        else:
            at_the_bottom()
"""
MANY_THREADS = f"""{DEEP}
    there = threading.Barrier(81)
    def at_the_bottom():
        there.wait()
        time.sleep(1000)
    for _ in range(80):
        threading.Thread(target=deep, args=(DEPTH,), daemon=True).start()
    there.wait()
"""


def test_a_long_dump_comes_whole():
    with Process(MANY_THREADS.replace("DEPTH", "7")) as process:
        for _ in range(5):
            assert run_round(process).count(" in deep") == 80 * 8


def test_a_dump_that_is_longer_than_the_socket_holds_comes_whole():
    with Process(MANY_THREADS.replace("DEPTH", "39")) as process:
        for _ in range(2):
            assert run_round(process).count(" in deep") == 80 * 40


def test_of_what_the_handler_writes_more_of_than_the_pipe_holds_the_beginning_comes():
    """(Its end is lost, unless somebody has made room meanwhile.)"""
    with Process(MANY_THREADS.replace("DEPTH", "39"), KEEP_THE_LOCK) as process:
        for _ in range(2):
            assert process.pipe.ask() == process.pipe.insist() == ""
            eventually(lambda: unread(process.pipe.descriptors[1]) > 60_000)
            eventually(process.pipe.complete)
            assert 1000 < process.pipe.text().count(" in deep") <= 80 * 40


def unread(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_process_whose_stacks_move_outlives_every_question():
    """A handler that looked at them would meet frames that are gone, within some dozen signals."""
    recursing = f"""{DEEP}
    def at_the_bottom():
        pass
    def recurse():
        while True:
            deep(400)
    threading.Thread(target=recurse, daemon=True).start()
    """
    with Process(recursing) as process:
        for _ in range(100):
            assert "in <module>" in run_round(process)
        assert process.process.poll() is None


# Times are the round's own; the process has kept the lock before it, and does so after it.


def test_who_keeps_the_lock_is_sent_the_signal_a_while_later():
    with Process(at_last=KEEP_THE_LOCK) as process:
        asked = StackRound({0: process.pipe}, 100.0)
        assert not asked.advance(100.0 + LOCKED_S - 0.1)
        assert all(unread(fd) == 0 for fd in process.pipe.descriptors)
        eventually(lambda: asked.advance(100.0 + LOCKED_S))
        for told in (asked.told, take_stacks({0: process.pipe})):
            assert told[0].endswith('  File "<string>", line 9 in <module>')
        beating = StackRound({0: process.pipe}, 100.0, {0: 100.0 + LOCKED_S - 0.1}.__getitem__)
        assert not beating.advance(100.0 + LOCKED_S)
        assert all(unread(fd) == 0 for fd in process.pipe.descriptors)


@pytest.mark.parametrize(
    ("first", "before"),
    [
        ("signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGQUIT})", ""),
        ("import faulthandler", "faulthandler.unregister(signal.SIGQUIT)"),
    ],
)
def test_who_keeps_the_lock_and_does_not_take_the_signal_is_not_sent_it(first, before):
    with Process(before, KEEP_THE_LOCK, first) as process:
        asked = StackRound({0: process.pipe}, 100.0)
        assert asked.advance(100.0 + LOCKED_S)
        assert "does not catch SIGQUIT any more" in asked.told[0]
        assert process.process.poll() is None


def test_who_stops_or_ends_before_it_answers_is_said_to():
    with Process(at_last=KEEP_THE_LOCK) as process:
        asked = StackRound({0: process.pipe}, 100.0)
        process.stop()
        assert asked.advance(100.0 + LOCKED_S)
        assert asked.told == {0: "(it is stopped (SIGSTOP, or a terminal))"}
        process.process.send_signal(signal.SIGCONT)
        eventually(lambda: "is stopped" not in process_state(process.process.pid))
        asked = StackRound({0: process.pipe}, 100.0)
        process.process.kill()
        eventually(lambda: asked.advance(100.0))
        assert asked.told[0].startswith(("(it has ended", "(it ends"))


def test_a_process_that_never_writes_is_waited_for_a_while():
    with Process("signal.signal(signal.SIGQUIT, lambda *_: None)", KEEP_THE_LOCK) as process:
        asked = StackRound({0: process.pipe}, 100.0)
        assert not asked.advance(100.0 + PATIENCE_S - 0.1)
        assert asked.advance(100.0 + PATIENCE_S)
        assert asked.told == {0: f"(it has written nothing within {PATIENCE_S:g} s)"}


@pytest.mark.parametrize(
    ("answers", "complete", "told"),  # 0 ends the answer to a question; there have been two
    [
        (b"late0thread0", True, "thread"),
        (b"thread00", True, "thread"),
        ("late0thrÜ0".encode(), True, "thrÜ"),
        (b"late0thr", False, "handler"),
        (b"late0", False, "handler"),
        (b"late", False, "handler"),
        (b"", False, "handler"),
    ],
)
def test_of_all_that_comes_the_answer_to_the_last_question_is_told(answers, complete, told):
    asking, asked = socket.socketpair()
    handlers, writing = os.pipe()
    frame = '  File "script.py", line 2 in '
    with asked, contextlib.closing(StackPipe(asking.detach(), handlers, os.getpid())) as pipe:
        assert (pipe.ask(), pipe.ask()) == ("", "")
        assert asked.recv(100) == b"??"
        answers = re.sub(rb"(thr|late)", frame.encode() + rb"\1", answers)
        asked.send(answers.replace(b"0", b"\0"))
        os.write(writing, (frame + "handler").encode())
        assert (pipe.complete(), pipe.text()) == (complete, frame + told)
    os.close(writing)


def test_an_answer_that_comes_after_the_next_question_is_not_taken_for_its_own():
    asking, asked = socket.socketpair()
    handlers, writing = os.pipe()
    frame = b'  File "script.py", line 2 in '
    with asked, contextlib.closing(StackPipe(asking.detach(), handlers, os.getpid())) as pipe:
        assert pipe.ask() == ""
        asked.send(frame + b"l")
        assert not pipe.complete()
        assert pipe.ask() == ""
        asked.send(b"ate\0")
        assert not pipe.complete()
        asked.send(frame + b"new\0")
        assert pipe.complete()
        assert pipe.text() == (frame + b"new").decode()
    os.close(writing)


def test_a_process_that_has_closed_its_pipes_is_said_to_and_goes_on():
    with Process("os.close(asked); os.close(handlers)") as process:
        assert run_round(process) == "(it ends, or has closed the pipe in which it is asked)"
        assert process.process.poll() is None


CHILD = """
    leash, mine = os.pipe()
    if os.fork() == 0:  # (the child ends with us)
        os.close(mine)
        os.read(leash, 1)
        os._exit(0)
"""


@pytest.mark.parametrize("before", ["", CHILD], ids=["alone", "a child has the pipe"])
def test_a_file_of_the_scripts_that_has_the_pipes_number_gets_nothing(tmp_path, before):
    mine = tmp_path / "mine"
    mine.touch()
    reopen = f"""{before}
    file = os.open({str(mine)!r}, os.O_RDWR)
    os.dup2(file, asked)
    os.dup2(file, handlers)
    """
    with Process(reopen) as process:
        asked = StackRound({0: process.pipe}, 100.0)
        eventually(lambda: not catches_the_signal(process.process.pid))
        assert asked.advance(100.0 + LOCKED_S)
        why = "does not catch SIGQUIT any more" if before else "has closed the pipe"
        assert why in asked.told[0]
        assert process.process.poll() is None
    assert mine.read_bytes() == b""


def catches_the_signal(pid: int) -> bool:
    [mask] = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (signal.SIGQUIT - 1) & 1)
