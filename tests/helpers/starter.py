"""Starts scripts as `python script.py` would, in a tenth of a second: forked, torch imported.

    with Starter() as starter:
        ended = starter.start(script, {"RANK": "0", ...}).wait()

A process of its own forks them, so that nothing of the test's is in them. They end as Python ends a
program, exception hooks and exit handlers included, but for torch's teardown, which takes seconds.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hosts import enter

LIMIT_S = 60.0  # of anything that should take a few seconds, on a machine that is loaded


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str


class Started:
    """One script that runs."""

    def __init__(self, starter: Starter, pid: int, folder: Path) -> None:
        self.pid = pid
        self._starter = starter
        self._folder = folder
        self._code: int | None = None

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if it has not been waited for."""
        if self._code is None:
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for its end; a signal is a negative code."""
        if self._code is None:
            self._code = self._starter.ask("wait", self.pid)
        return Ended(self._code, self.out, self.err)


class Starter:
    """The test's handle on that process; every method waits until it has obeyed."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here)])},
            start_new_session=True,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="barepp-starter-")
        self._count = 0

    def start(
        self, script: Path, environ: Mapping[str, str], arguments: Sequence[str] = (), net: str = ""
    ) -> Started:
        """Start a script with these variables added, in that network namespace (hosts.py)."""
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        for name in ("out", "err"):
            (folder / name).touch()
        self._count += 1
        argv = [str(script), *arguments]
        return Started(self, self.ask("start", argv, dict(environ), str(folder), net), folder)

    def ask(self, *command: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


def main() -> None:
    """Be that process until its stdin ends."""
    import torch._dynamo  # noqa: F401  (every optimizer imports it)

    import barepp.train.pipeline  # noqa: F401

    for line in sys.stdin.buffer:
        name, *arguments = json.loads(line)
        if name == "wait":
            answer = _end_of(*arguments)
        else:
            answer = os.fork()
            if answer == 0:
                _be(*arguments)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _end_of(pid: int) -> int:
    with open(os.pidfd_open(pid)) as pidfd:
        if not select.select([pidfd], [], [], LIMIT_S)[0]:
            print(f"{pid} did not end within {LIMIT_S} s", file=sys.stderr)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _be(argv: list[str], environ: dict[str, str], folder: str, net: str) -> NoReturn:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with a test that is over
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for target, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY), target)
    if net:
        enter(net)
    os.environ.update(environ)
    tempfile.tempdir = None  # which had been looked up before
    sys.argv = argv
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def eventually(condition: Any, limit_s: float = LIMIT_S) -> None:
    """Wait for what no event announces."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "this did not come true in time"
        time.sleep(0.01)


if __name__ == "__main__":
    main()
