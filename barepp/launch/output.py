"""What the ranks print, line by line with the rank in front; and a job's history, `events.jsonl`.

A thread of its own copies what the ranks print:

1. A terminal may block for ever (Ctrl-S, a full pipe). The launcher's control loop must not: so
   only this thread ever writes to it. When it blocks, the pipes fill and the ranks wait in their
   own print, as any program would; nothing is lost and nothing piles up here.
2. What the launcher itself has to say comes after everything that the ranks have printed so far:
   the last words of a rank that died stand before the report of its death.
3. Whatever goes wrong with a terminal or a log file, the pipes are emptied: a rank must not hang
   because a disk is full.
4. A table that stands below (`--watch`) is taken away before anything is shown, and drawn again.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from barepp.monitor.terminal import Screen, new_screen

READ_NBYTES: Final = 64 * 1024
MAX_LINE_NBYTES: Final = 64 * 1024  # a longer line is shown in pieces
FLUSH_TIMEOUT_S: Final = 1.0  # how long the end of a job waits for the terminal


Write = Callable[[int, bytes], None]  # (1 for stdout or 2 for stderr, whole lines)


class _Source:
    """One pipe of one rank."""

    def __init__(self, rank: int, fd: int, target: int) -> None:
        self.rank = rank
        self.fd = fd
        self.target = target  # 1 or 2: where its lines go
        self.prefix = f"[rank {rank}] ".encode()
        self.partial = b""


class Output:
    """Copies the ranks' pipes to this process's stdout and stderr, and to one log file a rank.

    `write` replaces the descriptors 1 and 2, for programs with other streams.
    Use it as a context manager: leaving it shows what is still in the pipes, then ends the thread.
    """

    def __init__(self, log_dir: Path | None, write: Write | None = None) -> None:
        self._log_dir = log_dir
        self._write = write or write_to_descriptor
        self._logs: dict[int, BinaryIO] = {}
        self._later: deque[Callable[[], None]] = deque()  # to be done when all pipes are empty
        self._new: deque[_Source] = deque()
        self._picture: tuple[Sequence[str], os.terminal_size | None] | None = None  # the next one
        self._screen: Screen | None = None  # where a picture stands on a terminal
        self._finish_by: float | None = None
        self._selector = selectors.DefaultSelector()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wakeup, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="barepp-output", daemon=True)
        self._thread.start()

    def add_rank(self, rank: int, stdout_fd: int, stderr_fd: int) -> None:
        """Take over the reading ends of a rank's pipes; OSError when its log cannot be made."""
        if self._log_dir is not None:
            self._logs[rank] = (self._log_dir / f"rank{rank}.log").open("wb", buffering=0)
        for fd, target in ((stdout_fd, 1), (stderr_fd, 2)):
            os.set_blocking(fd, False)
            self._new.append(_Source(rank, fd, target))
        self._wake()

    def say(self, text: str, target: int = 2) -> None:
        """Print the launcher's own text after what the ranks have printed so far; never blocks."""
        self._later.append(partial(self._show, target, text.encode(errors="replace")))
        self._wake()

    def show_below(self, lines: Sequence[str], size: os.terminal_size | None) -> None:
        """Show a picture; of several at once only the last one is shown. Never blocks.

        On a terminal of that size it stands below whatever is shown from then on, in the place of
        the picture before, if rich is installed. Otherwise it is shown as other text is.
        """
        self._picture = lines, size
        self._wake()

    def let_stand(self) -> None:
        """Let the picture stay where it is: what is shown from then on comes below it."""
        self._later.append(self._leave_picture)
        self._wake()

    def write_log(self, rank: int, text: str) -> None:
        """Append text to a rank's log file, if there is one, after what the rank has printed."""
        self._later.append(partial(self._log, rank, text.encode(errors="replace")))
        self._wake()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._finish_by = time.monotonic() + FLUSH_TIMEOUT_S
        self._wake()
        self._thread.join(FLUSH_TIMEOUT_S + 0.5)
        if not self._thread.is_alive():  # else the terminal is blocked and the thread stays in it
            os.close(self._wakeup)
            self._selector.close()
            for log in self._logs.values():
                log.close()

    def _wake(self) -> None:
        os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        while True:
            waiting = bool(self._later) or self._finish_by is not None
            busy = False
            for key, _ in self._selector.select(0 if waiting else None):
                if key.data is None:
                    os.eventfd_read(self._wakeup)
                else:
                    busy |= self._read(key.data)
            self._draw()
            while self._new:
                source = self._new.popleft()
                self._selector.register(source.fd, selectors.EVENT_READ, source)
                busy = True
            # A process that a rank has started may hold its pipe and print for ever.
            late = self._finish_by is not None and time.monotonic() > self._finish_by
            if waiting and (not busy or late):
                if self._later:
                    self._later.popleft()()
                elif self._finish_by is not None:
                    self._close_sources()
                    return

    def _read(self, source: _Source) -> bool:
        """Show what the pipe holds; return whether it held anything."""
        try:
            data = os.read(source.fd, READ_NBYTES)
        except BlockingIOError:
            return False
        self._take(source, data)
        return bool(data)

    def _take(self, source: _Source, data: bytes) -> None:
        """Show and log what a rank has printed; nothing is the end of its pipe, which is closed."""
        self._log(source.rank, data)
        *lines, source.partial = (source.partial + data).split(b"\n")
        if source.partial and (not data or len(source.partial) > MAX_LINE_NBYTES):
            lines, source.partial = [*lines, source.partial], b""
        if lines:
            text = b"".join(source.prefix + line + b"\n" for line in lines)
            self._show(source.target, text)
        if not data:
            self._selector.unregister(source.fd)
            os.close(source.fd)

    def _close_sources(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._take(key.data, b"")

    def _draw(self) -> None:
        if self._picture is None:
            return
        (lines, size), self._picture = self._picture, None
        if size is not None and self._screen is None:
            self._screen = new_screen()
        if size is None or self._screen is None:
            self._show(2, _encoded("\n".join([*lines, "", ""])))
        else:
            self._put(2, _encoded(self._screen.draw(lines, size)))

    def _leave_picture(self) -> None:
        self._draw()
        if self._screen is not None:
            self._put(2, _encoded(self._screen.leave()))
            self._screen = None

    def _show(self, target: int, text: bytes) -> None:
        if self._screen is not None and (target == 2 or os.isatty(1)):
            target, text = 2, _encoded(self._screen.above(text.decode(errors="surrogateescape")))
        self._put(target, text)

    def _put(self, target: int, text: bytes) -> None:
        # A stream that a notebook or a test has put in its place may be closed by now.
        with contextlib.suppress(Exception):
            self._write(target, text)

    def _log(self, rank: int, data: bytes) -> None:
        log = self._logs.get(rank)
        if log is None or not data:
            return
        try:
            _write_all(log.fileno(), data)
        except OSError as error:
            log.close()
            del self._logs[rank]
            text = f"barepp: rank{rank}.log cannot be written any more: {error.strerror}\n"
            self._show(2, text.encode())


class EventLog:
    """Writes a job's history to a new file, one JSON object a line; does nothing without a path."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w", encoding="utf-8") if path is not None else None

    def write(self, event: str, rank: int, **fields: object) -> None:
        """Write one event of `rank` with the Unix time in seconds; never raises."""
        if self._file is not None:
            record = {"time": time.time(), "event": event, "rank": rank, **fields}
            with contextlib.suppress(OSError):  # a full disk must not end the job
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def write_to_descriptor(target: int, data: bytes) -> None:
    """Write all of `data` to descriptor `target`, however long that takes."""
    with contextlib.suppress(OSError):  # closed: there is no reader any more
        _write_all(target, data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # another process has made our terminal non-blocking
            with selectors.DefaultSelector() as selector:
                selector.register(fd, selectors.EVENT_WRITE)
                selector.select()
