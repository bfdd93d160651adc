"""Teams of processes that take turns: all alive in one run, and blocked while it is not theirs.

    with Conductor() as conductor:
        ours, theirs = conductor.start_barepp(4), conductor.start_torch(4)
        conductor.gather()
        for _ in range(rounds):
            ours.ask({"order": "train", ...})
            theirs.ask({"order": "train", ...})

1. A team that waits for its turn is blocked in a read: it takes no core from the one that works.
2. However the block ends, no process of a team is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from barepp.errors import BareppError

if TYPE_CHECKING:
    from barepp.bench.case import Case

START_S: Final = 120.0  # for all members to come
ANSWER_S: Final = 600.0  # for one answer
STOP_S: Final = 5.0  # for a team to end by itself
TAIL: Final = 2000  # characters of what a team said before it broke

# What the launcher runs on every rank. A text: a file of this package, run as a script, would put
# the package's folder on the path of imports.
SCRIPT: Final = "import barepp.bench.teams.barepp_rank\nbarepp.bench.teams.barepp_rank.main()\n"


class BenchError(BareppError):
    """A team of a benchmark broke, or computed something else than the others."""


@dataclasses.dataclass
class Team:
    """Processes that train together."""

    name: str  # for error messages
    number: int  # which one it is: its members say it when they come
    size: int
    processes: list[subprocess.Popen[bytes]]
    log: Path
    members: dict[int, socket.socket] = dataclasses.field(default_factory=dict)

    def ask(self, order: dict[str, Any]) -> list[dict[str, Any]]:
        """Give every member the order; return their answers in rank order."""
        try:
            self._tell(order)
            answers = self._answers()
        except OSError as error:
            raise self.broken(f"{type(error).__name__}: {error}") from error
        return [json.loads(answers[rank]) for rank in range(self.size)]

    def _tell(self, order: dict[str, Any]) -> None:
        for sock in self.members.values():
            sock.sendall(json.dumps(order).encode() + b"\n")

    def _answers(self) -> dict[int, bytearray]:
        """Read one line from every member; from all at once, to find the one that has ended."""
        answers = {rank: bytearray() for rank in self.members}
        deadline = time.monotonic() + ANSWER_S
        with selectors.DefaultSelector() as waiting:
            for rank, sock in self.members.items():
                waiting.register(sock, selectors.EVENT_READ, rank)
            while waiting.get_map():
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise self.broken(f"no answer after {ANSWER_S:g} s")
                for key, _ in ready:
                    data = self.members[key.data].recv(1 << 16)
                    if not data:
                        raise self.broken(f"rank {key.data} of it has ended")
                    answers[key.data] += data
                    if data.endswith(b"\n"):
                        waiting.unregister(key.fileobj)
        return answers

    def build(self, case: Case) -> None:
        """Let every member build a case."""
        self.ask({"order": "build", "case": case.to_record()})

    def train(self, schedule: str, steps: int, **options: str) -> list[dict[str, Any]]:
        """Run one turn: a step that warms up, and `steps` more."""
        return self.ask({"order": "train", "schedule": schedule, "steps": steps + 1, **options})

    def broken(self, why: str) -> BenchError:
        """Return the error for a team that cannot go on, with the end of what it printed."""
        deadline = time.monotonic() + STOP_S  # the launcher speaks when all its ranks have ended
        while time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        said = self.log.read_text(errors="replace")[-TAIL:].strip()
        return BenchError(f"the {self.name} team broke: {why}\n{said}".rstrip())

    def stop(self) -> None:
        """Let the processes end; kill those that do not."""
        with contextlib.suppress(OSError):
            self._tell({"order": "stop"})
        for sock in self.members.values():
            sock.close()
        deadline = time.monotonic() + (STOP_S if len(self.members) == self.size else 0)
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill(process)


def step_times(answers: list[dict[str, Any]]) -> list[float]:
    """Return the seconds of each step but the first, over all ranks of a team.

    A step lasts from the end of the one before, on the rank where that was last, to its own: ranks
    need not be in step, and no time is left out or counted twice.
    """
    ends = [max(column) for column in zip(*(answer["ends"] for answer in answers), strict=True)]
    return [(end - before) / 1e9 for before, end in itertools.pairwise(ends)]


class Conductor:
    """Starts teams and lets them take turns."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="barepp-bench-"))  # readable by its owner only
        self._path = str(self.folder / "conductor")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self._path)
        self._listening.listen(256)
        self._teams: list[Team] = []

    def start_barepp(self, world_size: int, *flags: str) -> Team:
        """Start ranks with barepp's own launcher."""
        script = self.folder / "ours.py"
        script.write_text(SCRIPT)
        command = ["barepp.launch", "--world", str(world_size), *flags, str(script)]
        return self._start("barepp", world_size, [[*command, self._path, self._number()]])

    def start_torch(self, world_size: int) -> Team:
        """Start ranks of torch.distributed over gloo."""
        store = str(self.folder / f"store-{self._number()}")
        start = [
            "barepp.bench.teams.torch_rank",
            self._path,
            self._number(),
            store,
            str(world_size),
        ]
        return self._start("torch", world_size, [[*start, str(rank)] for rank in range(world_size)])

    def start_alone(self) -> Team:
        """Start one process with the whole model."""
        command = ["barepp.bench.teams.one_process", self._path, self._number()]
        return self._start("one-process", 1, [command])

    def _number(self) -> str:
        return str(len(self._teams))

    def _start(self, name: str, size: int, modules: list[list[str]]) -> Team:
        number = len(self._teams)
        team = Team(name, number, size, [], self.folder / f"log-{number}")
        self._teams.append(team)  # before the first process: whatever happens, `close` ends it
        with team.log.open("wb") as log:
            for module in modules:
                team.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *module],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment(),
                        start_new_session=True,  # Ctrl-C is the conductor's to handle
                    )
                )
        return team

    def gather(self) -> None:
        """Block until every member of every team has come."""
        deadline = time.monotonic() + START_S
        self._listening.settimeout(0.2)
        while missing := [team for team in self._teams if len(team.members) < team.size]:
            for team in missing:
                if any(process.poll() is not None for process in team.processes):
                    raise team.broken("a process of it ended before it came")
                if time.monotonic() > deadline:
                    raise team.broken(f"not all of it came within {START_S:g} s")
            with contextlib.suppress(TimeoutError):
                self._admit(self._listening.accept()[0])

    def _admit(self, sock: socket.socket) -> None:
        sock.settimeout(START_S)
        with sock.makefile() as stream:
            hello = json.loads(stream.readline())
        self._teams[hello["team"]].members[hello["rank"]] = sock

    def close(self) -> None:
        """End all teams and remove what they left."""
        for team in self._teams:
            team.stop()
        self._listening.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Conductor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def environment() -> dict[str, str]:
    """Return the environment of a child: the same barepp as here, and one compute thread."""
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a launcher so that it ends its ranks; anything else at once."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
