"""Every rank's Python stack from outside, also of one that holds Python's lock or never looks up.

    launcher ── a question, one byte ──> a thread of the rank, which answers on the same socket
             ── STACKS_SIGNAL ─────────> faulthandler's handler, in C, which writes into a pipe

The launcher asks the thread. Where the thread cannot run, it sends the signal.

1. The thread holds Python's lock while it takes the stacks, so that no stack moves. The handler
   does not: it may read a frame of another thread that has gone meanwhile, and the process dies of
   SIGSEGV (Python 3.11: once in 25 signals to a process with a thread that does nothing but
   recurse). So the signal is only for a rank that has neither answered nor given another sign of
   life for long: one of its threads keeps the lock, and the others stand still.
2. A zero byte ends the answer to each question, and questions are answered in order.
3. Nothing marks the end of what the handler writes; it is all here when the process has left the
   handler. While it is inside, the kernel blocks the signal for the thread that runs it, the main
   one. The kernel restarts the system call that it interrupted (SA_RESTART), and Python itself the
   few that are never restarted (epoll, poll, sleep: PEP 475).
4. A process that does not catch the signal would die of it, so it is not sent it. Nor is one that
   blocks it or is stopped, which would write only once it goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

import transport
from transport.errors import printable

STACKS_SIGNAL: Final = signal.SIGQUIT  # as for Java and Go: "tell me where you are"
LIMIT_NBYTES: Final = 256 * 1024  # of one answer
LOCKED_S: Final = 1.0  # a rank that has not answered for so long keeps the lock
PATIENCE_S: Final = 2.0  # how long a process may take to write
LAST_LOCKED_S: Final = 0.3  # the same where the job is about to end anyway
LAST_PATIENCE_S: Final = 1.0
POLL_S: Final = 0.01  # between two looks whether the handler is over: no event says so
_NOTHING: Final = "none of its threads is in the script's code"
_FRAME: Final = re.compile(r'  File "([^"]*)", line \d+ in ')
_HOMES: Final = tuple(
    str(package) for package in (Path(str(transport.__file__)).parent, Path(__file__).parents[1])
)
_CALLERS: Final = ("<frozen runpy>", f"{_HOMES[1]}/worker/main.py")
_STATES: Final = {
    "T": "is stopped (SIGSTOP, or a terminal)",
    "t": "is held by a debugger",
    "D": "sleeps inside the kernel, in a system call that cannot be interrupted",
    "Z": "has ended, and its parent has not collected it",
    "R": "computes, and has not let go of Python's lock",
    "S": "sleeps, and has not let go of Python's lock",
}


# -- in the process --------------------------------------------------------------------------------


def tell_stacks(asked: int, handlers: int) -> None:
    """Tell this process's stacks whenever the launcher asks; returns at once.

    `asked` is a socket for questions and answers, `handlers` the pipe into which the handler
    writes. What does not fit into that is lost.
    """
    os.set_blocking(handlers, False)
    faulthandler.register(STACKS_SIGNAL, file=handlers, all_threads=True)
    threading.Thread(
        target=_answer, args=(asked, handlers), name="barepp-stacks", daemon=True
    ).start()


def _answer(asked: int, handlers: int) -> None:
    memory = os.memfd_create("barepp-stacks")  # (a write to a file in memory never blocks)
    ours = _files(asked, handlers, memory)
    with contextlib.suppress(OSError):  # the launcher has gone, or the script has closed them
        while questions := os.read(asked, 4096):
            # The script may have closed them, and files of its own have their numbers.
            if _files(asked, handlers, memory) != ours:
                break
            os.truncate(memory, 0)
            os.lseek(memory, 0, os.SEEK_SET)
            faulthandler.dump_traceback(memory, all_threads=True)
            stacks = os.pread(memory, LIMIT_NBYTES, 0)
            answer = memoryview(stacks + bytes(len(questions)))
            while answer:
                answer = answer[os.write(asked, answer) :]
    faulthandler.unregister(STACKS_SIGNAL)  # the handler has the same number


def _files(*fds: int) -> list[tuple[int, int]]:
    return [(stat.st_dev, stat.st_ino) for stat in map(os.fstat, fds)]


# -- in the launcher -------------------------------------------------------------------------------


class StackPipe:
    """The launcher's ends of the socket and the pipe of process `pid`, which may be asked often."""

    def __init__(self, asking: int, handlers: int, pid: int) -> None:
        self.descriptors = asking, handlers  # one is readable whenever something has come
        self._pid = pid
        self._unanswered = 0  # questions
        self._answers = b""  # by the thread, since the last question
        self._written = b""  # by the handler, since then or since the signal
        self._signalled = False
        self._closed = False  # whether the process has no socket or no pipe any more
        for fd in self.descriptors:
            os.set_blocking(fd, False)

    def refusal(self) -> str:
        """Return why the process cannot tell its stacks, in words, or "" when it can."""
        state = _status(self._pid).get("State", "X")[0]
        if state in "TtZX":
            return _STATES.get(state, "has ended")
        return "ends, or has closed the pipe in which it is asked" if self._closed else ""

    def ask(self) -> str:
        """Ask the process for its stacks; return why it cannot tell them, in words, or "".

        What is still here from an earlier time is thrown away.
        """
        if refusal := self.refusal():
            return refusal
        self._take()
        self._answers = self._written = b""
        self._signalled = False
        with contextlib.suppress(BlockingIOError):  # it has read no question for very long
            try:
                self._unanswered += os.write(self.descriptors[0], b"?")
            except OSError:
                self._closed = True
        return self.refusal()

    def insist(self) -> str:
        """Send the signal, unless that has been done; return why it cannot be, or ""."""
        if refusal := self.refusal():
            return refusal
        if self._signalled:
            return ""
        status = _status(self._pid)
        if not _signal_in(status, "SigCgt") or _signal_in(status, "SigBlk"):
            return "is starting still, or keeps Python's lock and does not catch SIGQUIT any more"
        self._take()
        self._written = b""
        try:
            os.kill(self._pid, STACKS_SIGNAL)
        except ProcessLookupError:
            return "has ended"
        self._signalled = True
        return ""

    def complete(self) -> bool:
        """Take what has come; whether that is all. Never blocks."""
        # In this order: once there are bytes, the handler is running or over (rule 3), and what it
        # had written when it was seen to be over is in the pipe.
        begun = self._signalled and self._written != b""
        status = _status(self._pid)
        self._take()
        inside = any(_signal_in(status, field) for field in ("SigPnd", "ShdPnd", "SigBlk"))
        handled = begun and not inside
        return not status or self._closed or handled or not self._unanswered

    def text(self) -> str:
        """Return the stacks that have come, without our own threads; "" when there are none."""
        self._take()
        newest = self._written
        if not self._unanswered:
            newest = self._answers.rstrip(b"\0").rpartition(b"\0")[2]
        threads = map(_of_the_script, newest.decode(errors="replace").split("\n\n"))
        return "\n\n".join(thread for thread in threads if thread)

    def close(self) -> None:
        """Close the socket and the pipe."""
        for fd in self.descriptors:
            os.close(fd)

    def _take(self) -> None:
        answers, written = map(self._read, self.descriptors)
        self._unanswered = max(0, self._unanswered - answers.count(0))
        self._answers = (self._answers + answers)[-2 * LIMIT_NBYTES :]  # (the last one, whole)
        self._written = (self._written + written)[:LIMIT_NBYTES]

    def _read(self, fd: int) -> bytes:
        """Return what has come, or a part of it: something may write there without end."""
        found = b""
        with contextlib.suppress(BlockingIOError):
            while len(found) < LIMIT_NBYTES:
                try:
                    more = os.read(fd, LIMIT_NBYTES)
                except ConnectionResetError:  # it has closed the socket with a question unread
                    more = b""
                if not more:
                    self._closed = True
                    break
                found += more
        return found


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
        wait([fd for pipe in self._asked.values() for fd in pipe.descriptors], POLL_S)

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
    lines = ["barepp: where every rank is:", *graph.splitlines(), *stack_lines(stacks)]
    return printable("\n".join(lines)) + "\n"


def stack_lines(stacks: Mapping[int, str]) -> Iterator[str]:
    """Yield the lines of a report that show these ranks' Python stacks."""
    for rank, text in sorted(stacks.items()):
        yield f"barepp: the Python stack of rank {rank}:"
        yield from ("    " + line for line in text.splitlines())
