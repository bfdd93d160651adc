"""One run of a command line that is about to fail, seen from outside.

1. The ranks note what happens to them in one named pipe, with the time at which it happened.
2. The end of the launcher is seen on a pidfd, in the moment in which it ends.
3. Nothing is taken from the launcher's word: its output is only read after its end.
4. What is left at the end of a run is counted, then killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

import psutil

from barepp.bench.faults.kinds import BAREPP, FAULTS, NOTES, VICTIM, WORLD_SIZE
from barepp.bench.teams.conductor import TAIL, environment
from barepp.errors import BareppError
from barepp.testing.leaks import LeakCheck

START_S: Final = 120.0  # for four ranks to come to the fault, on a machine that is busy
LIMIT_S: Final = 15.0  # from the fault until a launcher is given up
SCRIPT: Final = Path(__file__).with_name("script.py")


@dataclasses.dataclass
class Seen:
    """What was seen of one run. Times are milliseconds after the fault.

    Attributes:
        told: for each survivor that raised an error, when, and the error's text.
        back: when the launcher's process ended; None if it was given up.
        code: its exit code, as a shell shows it.
        output: all that it printed.
        processes, files: those that were there after its end, or when it was given up.
    """

    told: dict[int, tuple[float, str]] = dataclasses.field(default_factory=dict)
    back: float | None = None
    code: int | None = None
    output: str = ""
    processes: list[int] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)


def command(launcher: str, fault: str) -> list[str]:
    """Return the command line of a job; the folder for its notes follows."""
    if launcher == BAREPP:
        launch = ["barepp.launch", "--world", str(WORLD_SIZE), *FAULTS[fault]]
    else:
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    return [sys.executable, "-m", *launch, SCRIPT.name, launcher, fault]


def watch(command: list[str]) -> Seen:
    """Run the command to its end, or until the limit after its fault.

    Raises:
        BareppError: the fault never came.
    """
    with tempfile.TemporaryDirectory(prefix="barepp-faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        temporary = folder / "tmp"
        temporary.mkdir()
        shutil.copy(SCRIPT, folder)  # the stacks that barepp shows leave out files of its own
        with _Notes(folder) as notes, (folder / "output").open("w+b") as output:
            leaks, seen = LeakCheck(), Seen()
            process = subprocess.Popen(
                [*command, name],
                env={**environment(), "TMPDIR": str(temporary)},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process alone
            )
            try:
                ended_at = _wait(process, notes)
                found = leaks.leftovers([note["pid"] for note in notes.of("training").values()])
                seen.processes = sorted({int(x.split()[-1]) for x in found if "process" in x})
            finally:
                _kill(process, seen.processes)
            notes.read()  # the last words of the ranks
            output.seek(0)
            seen.output = output.read().decode(errors="replace")
        if notes.fault_at is None:
            raise BareppError(f"the fault never came; the job said\n{seen.output[-TAIL:]}")
        for rank, note in notes.of("told").items():
            if rank != VICTIM:
                seen.told[rank] = (1e3 * (note["monotonic"] - notes.fault_at), note["text"])
        seen.files = [x for x in found if x.startswith("shared memory")]
        if ended_at is not None:
            seen.back = 1e3 * (ended_at - notes.fault_at)
            seen.code = process.returncode if process.returncode >= 0 else 128 - process.returncode
            names = [path.name for path in temporary.iterdir()]
            seen.files += [x for x in names if not x.startswith("torchinductor_")]  # a cache
        return seen


def _wait(process: subprocess.Popen[bytes], notes: _Notes) -> float | None:
    """Return when the process ended; None when it has not, so long after the fault."""
    deadline = time.monotonic() + START_S
    end = os.pidfd_open(process.pid)
    try:
        while (left := deadline - time.monotonic()) > 0:
            if end in wait([end, notes.pipe], left):
                ended_at = time.monotonic()
                process.wait()
                notes.read()  # which may have come with the end
                return ended_at
            notes.read()
            if notes.fault_at is not None:
                deadline = notes.fault_at + LIMIT_S
    finally:
        os.close(end)
    return None


def _kill(process: subprocess.Popen[bytes], others: Iterable[int]) -> None:
    """Kill the launcher with all that it has started, and what has outlived it."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
        others = [*others, process.pid, *(child.pid for child in children)]
    for pid in others:
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()
    process.wait()


class _Notes:
    """What the ranks have noted: each note is one line of JSON, written in one piece."""

    def __init__(self, folder: Path) -> None:
        os.mkfifo(folder / NOTES)
        # Open for writing as well: so a read never meets the end of the file.
        self.pipe = os.open(folder / NOTES, os.O_RDWR | os.O_NONBLOCK)
        self._text = b""
        self._notes: list[dict[str, Any]] = []

    @property
    def fault_at(self) -> float | None:
        """When the fault came; None before."""
        return next((note["monotonic"] for note in self.of("injected").values()), None)

    def of(self, event: str) -> dict[int, dict[str, Any]]:
        """Return each rank's first note of an event."""
        return {n["rank"]: n for n in reversed(self._notes) if n["event"] == event}

    def read(self) -> None:
        """Read what is there."""
        with contextlib.suppress(BlockingIOError):
            self._text += os.read(self.pipe, 1 << 16)
        *lines, self._text = self._text.split(b"\n")
        self._notes += map(json.loads, lines)

    def __enter__(self) -> _Notes:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.pipe)
