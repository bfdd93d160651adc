"""Every rank's Python stack from outside, also of one that holds Python's lock or never looks up.

The launcher sends `STACKS_SIGNAL`; faulthandler's handler, written in C, then writes the stacks of
all threads into a pipe that was opened beforehand. What rests on how it does that:

1. The process goes on as if nothing had been. The handler calls no Python; the kernel restarts the
   system call that it interrupted (SA_RESTART), and Python itself the few that are never restarted
   (epoll, poll, sleep: PEP 475).
2. The last byte is here when the process has left the handler: nothing in what it writes marks the
   end. While it is inside, the kernel blocks the signal for the thread that runs it, the main one.
3. Whoever does not catch the signal would die of it: such a process is not asked. Nor is one that
   is stopped, which would write only once it goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import barepp
import transport

STACKS_SIGNAL: Final = signal.SIGQUIT  # as for Java and Go: "tell me where you are"
LIMIT_NBYTES: Final = 256 * 1024
PATIENCE_S: Final = 2.0  # how long a process may take to write
POLL_S: Final = 0.01  # between two looks whether it has: no event says so
_FRAME: Final = re.compile(r'  File "([^"]*)", line \d+ in ')
_HOMES: Final = tuple(str(Path(m.__file__ or "").parent) for m in (transport, barepp))
_CALLERS: Final = ("<frozen runpy>", f"{_HOMES[1]}/worker.py")
_STATES: Final = {
    "T": "is stopped (SIGSTOP, or a terminal)",
    "t": "is held by a debugger",
    "D": "sleeps inside the kernel, in a system call that cannot be interrupted",
    "Z": "has ended, and nobody has collected it",
    "R": "computes, and has not let go of Python's lock",
    "S": "sleeps, and has not let go of Python's lock",
}


def write_stacks_to(fd: int) -> None:
    """Write this process's stacks to `fd` whenever `STACKS_SIGNAL` comes; it never blocks."""
    os.set_blocking(fd, False)
    faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True)


class StackPipe:
    """The launcher's end of the pipe into which process `pid` writes, as often as it is asked."""

    def __init__(self, fd: int, pid: int) -> None:
        self._fd = fd
        self._pid = pid
        self._data = b""
        os.set_blocking(fd, False)

    def ask(self) -> str:
        """Let the process write its stacks; return why it cannot, in words, or "" when it can.

        What is still here from an earlier time is thrown away.
        """
        status = _status(self._pid)
        state = status.get("State", "X")[0]
        if state in "TtZX":
            return _STATES.get(state, "has ended")
        if not _signal_in(status, "SigCgt"):
            return "does not catch SIGQUIT: it is starting still, or the script has changed that"
        self._take()
        self._data = b""
        try:
            os.kill(self._pid, STACKS_SIGNAL)
        except ProcessLookupError:
            return "has ended"
        return ""

    def complete(self) -> bool:
        """Take what has come; whether that is all. Never blocks."""
        # In this order: once there are bytes, the handler is running or over (rule 2), and what it
        # had written when it was seen to be over is in the pipe.
        begun = bool(self._data)
        status = _status(self._pid)
        self._take()
        inside = any(_signal_in(status, field) for field in ("SigPnd", "ShdPnd", "SigBlk"))
        return not status or (begun and not inside)

    def text(self) -> str:
        """Return the stacks that have come, without our own threads; "" when there are none."""
        self._take()
        threads = map(_of_the_script, self._data.decode(errors="replace").split("\n\n"))
        return "\n\n".join(thread for thread in threads if thread)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._fd)

    def _take(self) -> None:
        left = LIMIT_NBYTES  # at one time, in case that somebody writes there without end
        with contextlib.suppress(BlockingIOError):
            while left > 0 and (more := os.read(self._fd, left)):
                left -= len(more)
                self._data = (self._data + more)[:LIMIT_NBYTES]


class StackRound:
    """Asks some ranks for their stacks at one time; over when each has told, or cannot.

    A rank without a pipe has ended: its process id may be another process's by now. Poll `advance`
    until it says so; times are `time.monotonic()` seconds. `told` is then each rank's stacks, or
    in brackets why there are none.
    """

    def __init__(self, pipes: Mapping[int, StackPipe | None], now: float) -> None:
        self._until = now + PATIENCE_S
        self._asked: dict[int, StackPipe] = {}
        self.told: dict[int, str] = {}
        for rank, pipe in pipes.items():
            refusal = "has ended" if pipe is None else pipe.ask()
            if pipe is not None and not refusal:
                self._asked[rank] = pipe
            else:
                self.told[rank] = f"(it {refusal})"

    def advance(self, now: float) -> bool:
        """Take what has come; whether the round is over."""
        for rank, pipe in list(self._asked.items()):
            if pipe.complete() or now >= self._until:
                nothing = "(none of its threads is in the script's code)"
                if now >= self._until:
                    nothing = f"(it has written nothing within {PATIENCE_S:g} s)"
                self.told[rank] = pipe.text() or nothing
                del self._asked[rank]
        return not self._asked


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
