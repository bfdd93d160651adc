"""Every rank's Python stack from outside, also of one that holds Python's lock or never looks up.

The launcher sends `STACKS_SIGNAL`; faulthandler's handler, written in C, then writes the stacks of
all threads into a pipe that was opened beforehand. A process that is stopped cannot do even that.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import threading
from pathlib import Path
from typing import Final

import barepp
import transport

STACKS_SIGNAL: Final = signal.SIGQUIT  # as for Java and Go: "tell me where you are"
LIMIT_NBYTES: Final = 256 * 1024
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


def read_stacks(fd: int) -> str:
    """Return what was written to the other end of the pipe, without our own threads; close it."""
    os.set_blocking(fd, False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while len(data) < LIMIT_NBYTES and (more := os.read(fd, LIMIT_NBYTES)):
            data += more
    os.close(fd)
    threads = map(_of_the_script, data.decode(errors="replace").split("\n\n"))
    return "\n\n".join(thread for thread in threads if thread)


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
    """Return what the kernel says of a process (proc_pid_stat(5)), in words; "" when unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return _STATES.get(stat.rpartition(")")[2].split()[0], "")
