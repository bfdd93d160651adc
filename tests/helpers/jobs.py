"""Jobs for tests: scripts as text, run by the real launcher, and a count of what they leave behind.

launch(...)    the command line, as a person types it: three seconds, for torch's import
run_job(...)   the same `Job` in this process, its ranks forked from here: a tenth of a second
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from barepp.errors import JobEnded
from barepp.launch.job import Job
from barepp.launch.output import EventLog, Output
from barepp.launch.processes.rank_process import Outcome
from barepp.launch.report import tell
from barepp.monitor.client import Line, socket_names
from barepp.testing.leaks import LeakCheck
from barepp.worker.spec import Options, Script

ROOT = Path(__file__).parent.parent.parent
MARK = "BAREPP_TEST_MARK"  # an environment variable that a job's processes inherit
LIMIT_S = 60.0  # of anything that should take a few seconds, on a machine that is loaded


@dataclasses.dataclass
class Finished:
    """A job that has ended."""

    code: int
    out: str
    err: str
    log_dir: Path
    seconds: float

    @property
    def events(self) -> list[dict[str, Any]]:
        text = (self.log_dir / "events.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def failed(self) -> dict[str, Any]:
        """The one primary failure."""
        (event,) = (e for e in self.events if e["event"] == "failed" and e["primary"])
        return event

    def log(self, rank: int) -> str:
        return (self.log_dir / f"rank{rank}.log").read_text(errors="replace")

    def said(self, rank: int) -> list[str]:
        """What a rank printed to stdout, without the prefix."""
        prefix = f"[rank {rank}] "
        return [line[len(prefix) :] for line in self.out.splitlines() if line.startswith(prefix)]

    @property
    def report(self) -> str:
        """What the launcher itself said, from its first word on."""
        start = self.err.find("barepp: ")
        return self.err[start:] if start >= 0 else ""


def write_script(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def run_job(folder: Path, text: str, world_size: int = 2, **options: Any) -> Finished:
    """Run a script's text on ranks that are forked from this process."""
    return run_script(folder, write_script(folder, text), (), world_size, **options)


def run_script(
    folder: Path, path: Path, arguments: Sequence[str], world_size: int, **options: Any
) -> Finished:
    """Run a script as it stands on ranks that are forked from this process."""
    shown: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
    log_dir = folder / "log"
    log_dir.mkdir(exist_ok=True)
    script = Script(str(path), tuple(arguments))
    events = EventLog(log_dir / "events.jsonl")
    began = time.monotonic()
    with Output(log_dir, write=lambda target, data: shown[target].extend(data)) as output:
        outcome: Outcome = Job(
            script, Options(world_size, **options), output, events, fork=True
        ).run()
        seconds = time.monotonic() - began
        tell(outcome, output)
    events.close()
    out, err = (shown[target].decode(errors="replace") for target in (1, 2))
    return Finished(outcome.exit_code, out, err, log_dir, seconds)


@dataclasses.dataclass
class Watched:
    """A job that runs in a thread of this process, and a line to its launcher."""

    line: Line
    thread: threading.Thread
    ended: list[Finished]

    def finish(self) -> Finished:
        self.thread.join(LIMIT_S)
        return self.ended[0]


@contextlib.contextmanager
def watched_job(folder: Path, text: str, world_size: int = 2, **options: Any) -> Iterator[Watched]:
    """Run a script's text as `run_job` does, but meanwhile the block."""
    ended: list[Finished] = []
    thread = threading.Thread(
        target=lambda: ended.append(run_job(folder, text, world_size, **options))
    )
    thread.start()
    while not (own := [door for door in socket_names() if door.pid == os.getpid()]):
        assert thread.is_alive(), ended[0].report
        time.sleep(0.01)
    with Line(own[0]) as line:
        pids = [rank.pid for rank in line.status()[1]]
        try:
            yield Watched(line, thread, ended)
        except BaseException as error:
            for pid in pids:  # else nobody would ever end it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid or 0, signal.SIGKILL)
            if isinstance(error, JobEnded):  # too early: why is what matters
                thread.join(LIMIT_S)
                raise AssertionError(ended[0].report) from error
            raise
        finally:
            thread.join(LIMIT_S)


@dataclasses.dataclass
class Running:
    """A launcher that runs; its process is the leader of a group of its own."""

    process: subprocess.Popen[bytes]
    mark: str
    folder: Path
    began: float

    def finish(self, timeout: float = LIMIT_S) -> Finished:
        out, err = self.process.communicate(timeout=timeout)
        seconds = time.monotonic() - self.began
        text = [data.decode(errors="replace") if data else "" for data in (out, err)]
        return Finished(self.process.returncode, text[0], text[1], self.folder / "log", seconds)

    def wait_for_line(self, words: str, count: int = 1) -> list[str]:
        """Read the launcher's stdout until `count` lines contained `words`; return those."""
        assert self.process.stdout is not None
        watchdog = threading.Timer(LIMIT_S, self.process.kill)
        watchdog.start()
        found = []
        try:
            while len(found) < count:
                line = self.process.stdout.readline().decode(errors="replace")
                assert line, f"the launcher ended before {words!r} came {count} times: {found}"
                if words in line:
                    found.append(line.rstrip("\n"))
        finally:
            watchdog.cancel()
        return found

    def processes(self) -> list[psutil.Process]:
        """Return the launcher and all that it has started, whoever their parent is by now."""
        return marked(self.mark)


@contextlib.contextmanager
def launching(folder: Path, script: str | Path, *flags: str, **popen: Any) -> Iterator[Running]:
    """Start the command line; at the end of the block whatever is left of it is killed."""
    if isinstance(script, str):
        script = write_script(folder, script)
    mark = uuid.uuid4().hex
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        MARK: mark,
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT),
        **popen.pop("env", {}),
    }
    command = [sys.executable, "-m", "barepp.launch", *flags]
    arguments = popen.pop("arguments", [])
    process = subprocess.Popen(
        [*command, "--log-dir", str(folder / "log"), str(script), *arguments],
        env=environment,
        cwd=popen.pop("cwd", folder),
        **{
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "start_new_session": True,
            **popen,
        },
    )
    running = Running(process, mark, folder, time.monotonic())
    try:
        yield running
    finally:
        for left in marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def launch(folder: Path, script: str | Path, *flags: str, **popen: Any) -> Finished:
    """Run the command line to its end, and check that nothing of it is left."""
    with launching(folder, script, *flags, **popen) as running:
        finished = running.finish()
        assert_nothing_left(running)
        return finished


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_nothing_left(running: Running, within_s: float = 2.0) -> None:
    """No process of the job, whoever its parent is; no file or socket in its temporary folder."""
    deadline = time.monotonic() + within_s
    while (left := running.processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, [(p.pid, p.name(), p.cmdline()) for p in left]
    assert temporary_files(running) == []


def temporary_files(running: Running) -> list[str]:
    """Return what the job has in its temporary folder, without torch's own cache."""
    names = (path.name for path in (running.folder / "tmp").iterdir())
    return [name for name in names if not name.startswith("torchinductor_")]


def listening_at(pids: Iterable[int]) -> set[str]:
    """Return the addresses at which these processes listen over TCP."""
    found = [c for pid in pids for c in psutil.Process(pid).net_connections("inet")]
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that a block leaves no thread, descriptor, child or shared memory in this process."""
    census = LeakCheck()
    yield
    assert not census.leftovers()


@contextlib.contextmanager
def loaded_machine(count: int = 2) -> Iterator[None]:
    """Keep all cores busy with somebody else's work, as on a machine that is shared."""
    loops = [
        subprocess.Popen(["nice", "-n", "19", sys.executable, "-c", "while True: pass"])
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.send_signal(signal.SIGKILL)
            loop.wait(10)
