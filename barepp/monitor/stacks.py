"""Every rank's Python stack from outside, also of one that holds Python's lock or never looks up.

The launcher asks with a byte in a pipe; a thread of the process answers in another. Where that
thread cannot run, the launcher sends `STACKS_SIGNAL`, and faulthandler's handler, written in C,
writes into the same pipe. What rests on how they do that:

1. The thread holds Python's lock while it writes, so that no stack moves. The handler does not: it
   may read a frame of another thread that has gone meanwhile, and the process dies of SIGSEGV
   (Python 3.11: once in 25 signals to a process with a thread that does nothing but recurse).
   Hence the signal is only for who has neither answered nor given another sign of life for long:
   as good as always, because one thread keeps the lock, and the others stand still.
2. The thread puts a mark before and after what it writes, which tells the question as well.
3. Nothing marks the end of what the handler writes; it is all here when the process has left the
   handler. While it is inside, the kernel blocks the signal for the thread that runs it, the main
   one. The kernel restarts the system call that it interrupted (SA_RESTART), and Python itself the
   few that are never restarted (epoll, poll, sleep: PEP 475).
4. Whoever does not catch the signal would die of it: such a process is not sent it. Nor is one that
   blocks it or is stopped, which would write only once it goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

import transport
from transport.errors import printable

STACKS_SIGNAL: Final = signal.SIGQUIT  # as for Java and Go: "tell me where you are"
LIMIT_NBYTES: Final = 256 * 1024
LOCKED_S: Final = 1.0  # who has not answered for so long is taken to keep the lock
PATIENCE_S: Final = 2.0  # how long a process may take to write
LAST_LOCKED_S: Final = 0.3  # the same where the job is about to end anyway
LAST_PATIENCE_S: Final = 1.0
POLL_S: Final = 0.01  # between two looks whether the handler is over: no event says so
_NOTHING: Final = "none of its threads is in the script's code"
_MARKS: Final = range(0xF8, 0x100)  # bytes that no text in UTF-8 has, each a question by turns
_ANY_MARK: Final = re.compile(rb"[\xf8-\xff]")
_FRAME: Final = re.compile(r'  File "([^"]*)", line \d+ in ')
_HOMES: Final = tuple(
    str(package) for package in (Path(str(transport.__file__)).parent, Path(__file__).parents[1])
)
_CALLERS: Final = ("<frozen runpy>", f"{_HOMES[1]}/worker/main.py")
_STATES: Final = {
    "T": "is stopped (SIGSTOP, or a terminal)",
    "t": "is held by a debugger",
    "D": "sleeps inside the kernel, in a system call that cannot be interrupted",
    "Z": "has ended, and nobody has collected it",
    "R": "computes, and has not let go of Python's lock",
    "S": "sleeps, and has not let go of Python's lock",
}


# -- in the process --------------------------------------------------------------------------------


def tell_stacks(questions: int, answers: int) -> None:
    """Write this process's stacks to `answers` whenever the launcher asks; returns at once.

    Both are descriptors of pipes. What does not fit into a full one is lost.
    """
    os.set_blocking(answers, False)
    faulthandler.register(STACKS_SIGNAL, file=answers, all_threads=True)
    threading.Thread(
        target=_answer, args=(questions, answers), name="barepp-stacks", daemon=True
    ).start()


def _answer(questions: int, answers: int) -> None:
    ours = _files(questions, answers)
    with contextlib.suppress(OSError):  # the launcher has gone, or the script has closed them
        while mark := os.read(questions, 4096)[-1:]:  # (the newest question is the one that counts)
            if _files(questions, answers) != ours:
                break  # the script has closed them, and files of its own have their numbers
            _write_mark(answers, mark)
            faulthandler.dump_traceback(answers, all_threads=True)
            _write_mark(answers, mark)
    faulthandler.unregister(STACKS_SIGNAL)  # the handler has the same number


def _files(*fds: int) -> list[tuple[int, int]]:
    return [(stat.st_dev, stat.st_ino) for stat in map(os.fstat, fds)]


def _write_mark(fd: int, mark: bytes) -> None:
    while True:
        try:
            os.write(fd, mark)
            return
        except BlockingIOError:  # the pipe is full
            room = select.poll()
            room.register(fd, select.POLLOUT)
            room.poll()


# -- in the launcher -------------------------------------------------------------------------------


class StackPipe:
    """The launcher's ends of the pipes to and from process `pid`, which may be asked often."""

    def __init__(self, questions: int, answers: int, pid: int) -> None:
        self._questions, self._answers = questions, answers
        self._pid = pid
        self._number = 0
        self._data = b""
        self._signalled_at: int | None = None  # how much had come when the signal was sent
        self._closed = False  # whether the process has no pipe any more
        for fd in (questions, answers):
            os.set_blocking(fd, False)

    def fileno(self) -> int:
        """Return the descriptor that is readable whenever something has come."""
        return self._answers

    def refusal(self) -> str:
        """Return why the process cannot tell its stacks, in words, or "" when it can."""
        state = _status(self._pid).get("State", "X")[0]
        if state in "TtZX":
            return _STATES.get(state, "has ended")
        return "ends, or has closed the pipe in which it is asked" if self._closed else ""

    def ask(self) -> str:
        """Let the process write its stacks; return why it cannot, in words, or "" when it can.

        What is still here from an earlier time is thrown away.
        """
        if refusal := self.refusal():
            return refusal
        self._take()
        self._data, self._signalled_at = b"", None
        self._number = (self._number + 1) % len(_MARKS)
        with contextlib.suppress(BlockingIOError):  # it has read no question for very long
            try:
                os.write(self._questions, self._mark())
            except BrokenPipeError:
                self._closed = True
        return self.refusal()

    def insist(self) -> str:
        """Send the signal, unless that has been done; return why it cannot be, or ""."""
        if refusal := self.refusal():
            return refusal
        if self._signalled_at is not None:
            return ""
        status = _status(self._pid)
        if not _signal_in(status, "SigCgt") or _signal_in(status, "SigBlk"):
            return "is starting still, or keeps Python's lock and does not catch SIGQUIT any more"
        self._take()
        nbytes = len(self._data)
        try:
            os.kill(self._pid, STACKS_SIGNAL)
        except ProcessLookupError:
            return "has ended"
        self._signalled_at = nbytes
        return ""

    def complete(self) -> bool:
        """Take what has come; whether that is all. Never blocks."""
        # In this order: once there are bytes, the handler is running or over (rule 3), and what it
        # had written when it was seen to be over is in the pipe.
        begun = self._signalled_at is not None and len(self._data) > self._signalled_at
        status = _status(self._pid)
        self._take()
        inside = any(_signal_in(status, field) for field in ("SigPnd", "ShdPnd", "SigBlk"))
        handled = begun and not inside
        return not status or self._closed or handled or self._data.count(self._mark()) == 2

    def text(self) -> str:
        """Return the stacks that have come, without our own threads; "" when there are none."""
        self._take()
        threads = map(_of_the_script, self._newest().decode(errors="replace").split("\n\n"))
        return "\n\n".join(thread for thread in threads if thread)

    def close(self) -> None:
        """Close the pipes."""
        os.close(self._questions)
        os.close(self._answers)

    def _mark(self) -> bytes:
        return bytes([_MARKS[self._number]])

    def _newest(self) -> bytes:
        """Return the answer to the last question.

        That is what the thread has written between two marks. While the second is not there, it is
        what the handler has written, before the first or after it. At the beginning may be what is
        left of earlier answers.
        """
        before, *answer = self._data.split(self._mark())
        handlers = _ANY_MARK.split(before)[-1]
        return answer[0] if len(answer) > 1 else handlers or b"".join(answer)

    def _take(self) -> None:
        left = LIMIT_NBYTES  # at one time, in case that somebody writes there without end
        with contextlib.suppress(BlockingIOError):
            while left > 0:
                more = os.read(self._answers, left)
                if not more:
                    self._closed = True
                    return
                left -= len(more)
                self._data = (self._data + more)[:LIMIT_NBYTES]


class StackRound:
    """Asks some ranks for their stacks at one time; over when each has told, or cannot.

    A rank without a pipe has ended: its process id may be another process's by now. Who has not
    answered for `locked_s` seconds, nor given the sign of life whose time `heard_at` tells, is sent
    the signal; after `patience_s` it is given up. Poll `advance` until it says that the round is
    over; times are `time.monotonic()` seconds. `told` is then each rank's stacks, or in brackets
    why there are none.
    """

    def __init__(
        self,
        pipes: Mapping[int, StackPipe | None],
        now: float,
        heard_at: Callable[[int], float] = lambda rank: -math.inf,
        *,
        locked_s: float = LOCKED_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._began, self._heard_at = now, heard_at
        self._locked_s, self._patience_s = locked_s, patience_s
        self._asked: dict[int, StackPipe] = {}
        self.told: dict[int, str] = {}
        for rank, pipe in pipes.items():
            refusal = "has ended" if pipe is None else pipe.ask()
            if pipe is not None and not refusal:
                self._asked[rank] = pipe
            else:
                self.told[rank] = f"(it {refusal})"

    def wait(self) -> None:
        """Block until something has come, or until it is time for another look."""
        wait([pipe.fileno() for pipe in self._asked.values()], POLL_S)

    def advance(self, now: float) -> bool:
        """Take what has come; whether the round is over."""
        for rank, pipe in list(self._asked.items()):
            nothing = ""
            if pipe.complete():
                refusal = pipe.refusal()
                nothing = f"it {refusal}" if refusal else _NOTHING
            elif now - self._began >= self._patience_s:
                nothing = f"it has written nothing within {self._patience_s:g} s"
            elif now - max(self._began, self._heard_at(rank)) >= self._locked_s:
                refusal = pipe.insist()
                nothing = f"it {refusal}" if refusal else ""
            if nothing:
                self.told[rank] = pipe.text() or f"({nothing})"
                del self._asked[rank]
        return not self._asked


def take_stacks(pipes: Mapping[int, StackPipe | None]) -> dict[int, str]:
    """Return what a whole `StackRound` tells of a job that is about to end; may block for 1 s."""
    asked = StackRound(pipes, time.monotonic(), locked_s=LAST_LOCKED_S, patience_s=LAST_PATIENCE_S)
    while not asked.advance(time.monotonic()):
        asked.wait()
    return asked.told


def _of_the_script(thread: str) -> str:
    """Return a thread's stack without the frames around the script's own; "" when it has none.

    Above them (inside) is how we wait, which the rank's position says better; below is how the
    script was called.
    """
    lines = thread.strip("\n").splitlines()
    files = [match[1] if (match := _FRAME.match(line)) else None for line in lines]
    end = next((i for i, file in enumerate(files) if file in _CALLERS), len(lines))
    start = next((i for i in range(end) if files[i] is not None and not _ours(files[i])), end)
    return "\n".join(lines[start:end])


def _ours(file: str | None) -> bool:
    return file is not None and (file.startswith(_HOMES) or file == threading.__file__)


def process_state(pid: int) -> str:
    """Return what the kernel says of a process (proc_pid_status(5)), in words; "" when unknown."""
    return _STATES.get(_status(pid).get("State", "?")[0], "")


def _status(pid: int) -> dict[str, str]:
    """Return what the kernel says of a process's main thread; empty when there is none."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (s.partition(":") for s in text.splitlines())}


def _signal_in(status: Mapping[str, str], field: str) -> bool:
    return bool(int(status.get(field, "0"), 16) >> (STACKS_SIGNAL - 1) & 1)


def where_all_are(graph: str, stacks: Mapping[int, str]) -> str:
    """Return who waits for whom and every rank's Python stack, of a job that runs; many lines."""
    lines = ["barepp: where every rank is:", *graph.splitlines(), *_stack_lines(stacks)]
    return printable("\n".join(lines)) + "\n"


def _stack_lines(stacks: Mapping[int, str]) -> list[str]:
    lines = []
    for rank, text in sorted(stacks.items()):
        lines.append(f"barepp: the Python stack of rank {rank}:")
        lines += ["    " + line for line in text.splitlines()]
    return lines
