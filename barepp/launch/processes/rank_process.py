"""The process of one rank, as the launcher that started it holds it; and how a job ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from typing import Final

from barepp.launch.job_state import Member
from barepp.monitor.stacks import StackPipe
from barepp.worker.spec import CUT_OFF, LENGTH
from transport.errors import Failure

READ_NBYTES: Final = 1024 * 1024
KILL_WAIT_S: Final = 5.0  # from SIGKILL to the end of the process


class ResultReader:
    """Reads one result as it comes; never blocks, however slowly the rank writes it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._data = bytearray()
        self._ended = False
        os.set_blocking(fd, False)

    def read(self) -> bool:
        """Take what is there; return whether more can come."""
        while not self._ended:
            try:
                data = os.read(self.fd, READ_NBYTES)
            except BlockingIOError:
                return True
            self._data += data
            self._ended = not data
        return False

    def result(self) -> memoryview | None:
        """Return the pickled result, or None when it is not there in full."""
        if len(self._data) < LENGTH.size:
            return None
        (nbytes,) = LENGTH.unpack_from(self._data)
        whole = len(self._data) == LENGTH.size + nbytes
        return memoryview(self._data)[LENGTH.size :] if whole else None

    def cut_off(self) -> str | None:
        """Return what the rank was about when it lost its control connection; None otherwise."""
        if not self._data.startswith(LENGTH.pack(CUT_OFF)):
            return None
        return self._data[LENGTH.size :].decode(errors="replace")

    def close(self) -> None:
        """Take what nobody has read yet, then close the pipe."""
        self.read()
        os.close(self.fd)


@dataclasses.dataclass(kw_only=True)
class Rank(Member):
    """A rank whose process this launcher has started.

    Attributes:
        ended_fd: is readable once the process has ended.
        stack_pipe: asks it for its Python stacks.
    """

    process: BaseProcess
    ended_fd: int
    result: ResultReader
    stack_pipe: StackPipe
    pid: int

    def kill(self) -> None:
        """End its process now, unless it has ended."""
        if self.status is None:
            self.killed = True
            self.process.kill()

    def let_go(self) -> None:
        """Close what the launcher holds of it, now that the job is over."""
        if self.status is None:  # an error of the launcher's own brought us here
            self.process.kill()
            self.kill_started()
            self.process.join(KILL_WAIT_S)
        os.close(self.ended_fd)
        self.result.close()
        self.stack_pipe.close()
        with contextlib.suppress(ValueError):  # it has not ended even now
            self.process.close()

    def kill_started(self) -> None:
        """End what it had started, data loaders for example, now that it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # it led a process group of its own


def stack_pipes(ranks: Iterable[Rank]) -> dict[int, StackPipe | None]:
    """Return whom to ask for their stacks: not the ranks whose processes have ended."""
    return {r.rank: None if r.status is not None else r.stack_pipe for r in ranks}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        failure: the first failure, if any.
        ranks: those that this launcher had started.
        signal: which one the launcher itself was sent.
        elsewhere: what node 0 knows of the ranks of other nodes.
    """

    failure: Failure | None
    ranks: list[Rank]
    signal: int | None = None
    elsewhere: tuple[Member, ...] = ()

    @property
    def exit_code(self) -> int:
        """What the launcher exits with."""
        failure = self.failure
        if failure is None:
            return 0
        if failure.signal is not None:
            return (128 + failure.signal) & 0xFF
        if failure.cause == "hang":
            return 124
        return (failure.exit_code or 0) & 0xFF or 1
