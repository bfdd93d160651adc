"""Runs one command line that is about to fail, and watches it from outside.

1. What ranks see they write into a named pipe, with the time at which they saw it.
2. The end of a process is seen on a pidfd, in the moment in which it ends.
3. Nothing is taken from the launcher's word: its output is only read after its end.
4. Whatever is left at the end of a run is counted, then killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil

from barepp.bench.faults.kinds import ASLEEP, RECORDS, WORLD_SIZE, Fault, Where
from barepp.errors import BareppError

START_S: Final = 120.0  # for four ranks to come to step 20, on a machine that is busy
LIMIT_S: Final = 15.0  # from the fault to the end of our patience
ORPHAN_S: Final = 2.0  # from the launcher's end to the last rank's
_MARK: Final = "BAREPP_BENCH_MARK"  # an environment variable that a job's processes inherit
_SCRIPTS: Final = Path(__file__).parent


@dataclasses.dataclass
class Seen:
    """What was seen of one run. Times are milliseconds after the fault.

    Attributes:
        told: for each rank that raised an error, when, and the error's text.
        ended: when each rank's process ended.
        back: when the launcher's process ended; None if it did not within the limit.
        code: its exit code, as a shell shows it.
        output: all that it printed.
        left: the processes and files that were there after its end, or at the limit's.
        seconds: what the whole run took.
    """

    fault: str
    told: dict[int, tuple[float, str]] = dataclasses.field(default_factory=dict)
    ended: dict[int, float] = dataclasses.field(default_factory=dict)
    back: float | None = None
    code: int | None = None
    output: str = ""
    left: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def barepp_command(fault: Fault) -> list[str]:
    """Return the command line of a job of ours; the script's arguments follow."""
    launch = ["-m", "barepp.launch", "--world", str(WORLD_SIZE), *fault.flags]
    return [sys.executable, *launch, "script_barepp.py"]


def torch_command(fault: Fault) -> list[str]:
    """Return torchrun's command line for the same training."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    return [sys.executable, *launch, "script_torch.py"]


def watch(command: Callable[[Fault], list[str]], fault: Fault) -> Seen:
    """Run the command until all its processes have ended, or the limit after the fault is over.

    Raises:
        BareppError: the fault never came.
    """
    with (
        tempfile.TemporaryDirectory(prefix="barepp-faults-", ignore_cleanup_errors=True) as folder,
        contextlib.closing(_Watched(command(fault), fault, Path(folder))) as watched,
    ):
        return watched.run()


class _Watched:
    """One command line, from its start to the count of what it leaves."""

    def __init__(self, command: list[str], fault: Fault, folder: Path) -> None:
        self._fault, self._folder = fault, folder
        self._mark = uuid.uuid4().hex
        self._seen = Seen(fault.name)
        self._pids: dict[int, int] = {}  # of the ranks
        self._running: set[int] = set()  # descriptors of processes that have not ended
        self._fault_ns: int | None = None
        self._told_ns: dict[int, tuple[int, str]] = {}
        self._ended_ns: dict[int, int] = {}
        self._launcher_ended_ns: int | None = None
        self._text = b""
        (folder / "tmp").mkdir()
        # (A copy: files of barepp's own are left out of the stacks that it shows.)
        for script in ("script_barepp.py", "script_torch.py"):
            shutil.copy(_SCRIPTS / script, folder)
        for pipe in (RECORDS, ASLEEP):
            os.mkfifo(folder / pipe)
        # (Open for writing as well: so no reader meets the end when a rank closes its side.)
        self._records_fd = os.open(folder / RECORDS, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._records_fd, selectors.EVENT_READ, self._on_records)
        self._began = time.monotonic()
        with (folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [*command, fault.name, str(folder)],
                env=self._environment(),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # as in a terminal of its own, for Ctrl-C
            )
        self._watch_process(self._process.pid, self._on_launcher_end)

    def _environment(self) -> dict[str, str]:
        ours = str(Path(__file__).parents[3])
        others = os.environ.get("PYTHONPATH")
        return {
            **os.environ,
            _MARK: self._mark,
            "PYTHONPATH": f"{ours}{os.pathsep}{others}" if others else ours,
            "TMPDIR": str(self._folder / "tmp"),
            "OMP_NUM_THREADS": "1",  # what torchrun would set, with four lines about it
            "PYTHONWARNINGS": "ignore:Failed to initialize NumPy",
        }

    def run(self) -> Seen:
        """Wait for the end of it all."""
        while self._running and (left := self._deadline() - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                key.data()
        self._on_records()  # the last words of those that have ended
        seen = self._seen
        seen.seconds = time.monotonic() - self._began
        seen.output = (self._folder / "output").read_text(errors="replace")
        if self._fault_ns is None and self._fault.where is not Where.NOWHERE:
            tail = "\n".join(seen.output.splitlines()[-20:])
            raise BareppError(f"the fault {self._fault.name!r} never came; the job said\n{tail}")
        seen.told = {rank: (self._ms(at), text) for rank, (at, text) in self._told_ns.items()}
        seen.ended = {rank: self._ms(at) for rank, at in self._ended_ns.items()}
        if self._launcher_ended_ns is not None:
            code = self._process.wait()
            seen.back, seen.code = (
                self._ms(self._launcher_ended_ns),
                code if code >= 0 else 128 - code,
            )
        seen.left = self._left_behind()
        return seen

    def close(self) -> None:
        """Kill what is left, and let go of everything."""
        for process in self._alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        for fd in (*self._running, self._records_fd):
            os.close(fd)
        self._selector.close()

    # -- what happens -----------------------------------------------------------------------------

    def _on_records(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._text += os.read(self._records_fd, 1 << 16)
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            record = json.loads(line)
            self._on_record(record["what"], record["rank"], record)

    def _on_record(self, what: str, rank: int, record: dict[str, Any]) -> None:
        if what == "joining":
            self._pids[rank] = record["pid"]
            self._watch_process(record["pid"], partial(self._on_rank_end, rank))
            if self._fault.where is Where.BEFORE and self._fault_ns is None:
                self._fault_ns = record["at_ns"]  # from the first one's coming the last one is late
        elif what == "fault":
            self._fault_ns = record["at_ns"]
            if self._fault.where is Where.LAUNCHER:
                self._strike()
        elif what == "told":
            self._told_ns.setdefault(rank, (record["at_ns"], record["text"]))

    def _strike(self) -> None:
        """Do to the launcher what is due."""
        self._fault_ns = time.monotonic_ns()
        if self._fault.name == "interrupt":
            os.killpg(self._process.pid, signal.SIGINT)  # as a terminal does
        else:
            self._process.kill()

    def _watch_process(self, pid: int, on_end: Callable[[], None]) -> None:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended before we came to look
            on_end()
            return
        self._running.add(fd)

        def ended() -> None:
            self._selector.unregister(fd)
            self._running.discard(fd)
            os.close(fd)
            on_end()

        self._selector.register(fd, selectors.EVENT_READ, ended)

    def _on_launcher_end(self) -> None:
        self._launcher_ended_ns = time.monotonic_ns()

    def _on_rank_end(self, rank: int) -> None:
        self._ended_ns[rank] = time.monotonic_ns()

    def _deadline(self) -> float:
        if self._launcher_ended_ns is not None:
            return self._launcher_ended_ns / 1e9 + ORPHAN_S
        if self._fault_ns is not None:
            return self._fault_ns / 1e9 + LIMIT_S
        return self._began + START_S

    # -- what is left -----------------------------------------------------------------------------

    def _left_behind(self) -> list[str]:
        """Return the processes and files that outlived the launcher, or our patience with it."""
        while (alive := self._alive()) and time.monotonic() < self._deadline():
            psutil.wait_procs(alive, max(0.0, self._deadline() - time.monotonic()))
        left = [f"process {process.pid}" for process in alive]
        if self._launcher_ended_ns is not None:
            names = (path.name for path in (self._folder / "tmp").iterdir())
            left += [name for name in names if not name.startswith("torchinductor_")]  # a cache
        return left

    def _alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                marked = process.environ().get(_MARK) == self._mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _ms(self, at_ns: int) -> float:
        return (at_ns - (self._fault_ns or at_ns)) / 1e6
