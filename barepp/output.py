"""What the ranks print, line by line with the rank in front, on a thread of its own.

A terminal may block for ever (Ctrl-S, a full pipe). The launcher's control loop must not: so only
this thread ever writes to it. When it blocks, the pipes fill and the ranks wait in their own print,
as any program would; nothing is lost and nothing piles up here.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

READ_NBYTES: Final = 64 * 1024
MAX_LINE_NBYTES: Final = 64 * 1024  # a longer line is shown in pieces
FLUSH_TIMEOUT_S: Final = 1.0  # how long the end of a job waits for the terminal


Write = Callable[[int, bytes], None]  # (1 for stdout or 2 for stderr, whole lines)


class _Source:
    """One pipe of one rank."""

    def __init__(self, rank: int, fd: int, target: int, log: BinaryIO | None, prefix: str) -> None:
        self.rank = rank
        self.fd = fd
        self.target = target  # 1 or 2: where its lines go
        self.log = log
        self.prefix = prefix.encode()
        self.partial = b""


class Output:
    """Copies the ranks' pipes to this process's stdout and stderr, and to one log file a rank.

    `write` replaces the descriptors 1 and 2, for whoever has other streams.
    Use it as a context manager: leaving it shows what is still in the pipes, then ends the thread.
    """

    def __init__(self, log_dir: Path | None, write: Write | None = None) -> None:
        self._log_dir = log_dir
        self._write = write or write_to_descriptor
        self._logs: dict[int, BinaryIO] = {}
        self._said: deque[tuple[int, bytes]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wakeup, selectors.EVENT_READ, None)
        self._new: deque[_Source] = deque()
        self._finish_by: float | None = None
        self._thread = threading.Thread(target=self._run, name="barepp-output", daemon=True)
        self._thread.start()

    def add_rank(self, rank: int, stdout_fd: int, stderr_fd: int) -> None:
        """Take over the reading ends of a rank's pipes."""
        log = None
        if self._log_dir is not None:
            log = self._logs[rank] = (self._log_dir / f"rank{rank}.log").open("ab")
        prefix = f"[rank {rank}] "
        for fd, target in ((stdout_fd, 1), (stderr_fd, 2)):
            os.set_blocking(fd, False)
            self._new.append(_Source(rank, fd, target, log, prefix))
        self._wake()

    def say(self, text: str, target: int = 2) -> None:
        """Print the launcher's own text after what the ranks have printed so far; never blocks."""
        self._said.append((target, text.encode(errors="replace")))
        self._wake()

    def write_log(self, rank: int, text: str) -> None:
        """Append text to a rank's log file, if there is one."""
        log = self._logs.get(rank)
        if log is not None:
            log.write(text.encode(errors="replace"))
            log.flush()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
        sources = 0
        while True:
            finishing = self._finish_by is not None
            # When the ranks have ended, their pipes are at their end too, unless a process that a
            # rank has started still holds one: then nothing new for a moment is the end.
            ready = self._selector.select(0.1 if finishing else None)
            for key, _ in ready:
                if key.data is None:
                    os.eventfd_read(self._wakeup)
                elif not self._read(key.data):
                    sources -= 1
            while self._new:
                source = self._new.popleft()
                self._selector.register(source.fd, selectors.EVENT_READ, source)
                sources += 1
            busy = any(key.data is not None for key, _ in ready)
            if self._said and not (finishing and sources and busy):
                target, text = self._said.popleft()
                self._write(target, text)
                self._wake()
            late = self._finish_by is not None and time.monotonic() > self._finish_by
            if finishing and not self._said and (not sources or not busy or late):
                self._close_sources()
                return

    def _read(self, source: _Source) -> bool:
        try:
            data = os.read(source.fd, READ_NBYTES)
        except BlockingIOError:
            return True
        if source.log is not None and data:
            source.log.write(data)
            source.log.flush()
        *lines, source.partial = (source.partial + data).split(b"\n")
        if source.partial and (not data or len(source.partial) > MAX_LINE_NBYTES):
            lines, source.partial = [*lines, source.partial], b""
        if lines:
            self._write(source.target, b"".join(source.prefix + line + b"\n" for line in lines))
        if not data:
            self._selector.unregister(source.fd)
            os.close(source.fd)
        return bool(data)

    def _close_sources(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                if key.data.partial:
                    self._write(key.data.target, key.data.prefix + key.data.partial + b"\n")
                self._selector.unregister(key.fd)
                os.close(key.fd)


def write_to_descriptor(target: int, data: bytes) -> None:
    """Write all of `data` to descriptor `target`, however long that takes."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:  # somebody has made our terminal non-blocking
            _wait_writable(target)
        except OSError:
            return  # closed: nobody wants to see it any more


def _wait_writable(target: int) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(target, selectors.EVENT_WRITE)
        selector.select()
