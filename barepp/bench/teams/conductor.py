"""Teams of processes that take turns: all live through one run, and only one team works at a time.

    with Conductor() as conductor:
        ours, theirs = conductor.start_barepp(4), conductor.start_torch(4)
        conductor.gather()
        for _ in range(rounds):
            ours.train("1f1b", steps)
            theirs.train("1f1b", steps)

1. A member that waits for its turn is blocked in a read: it takes no core from the team that works.
2. When the block ends, for whatever reason, no process of a team is left.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

from barepp.errors import BareppError

START_S: Final = 120.0  # until all members of a team have connected
ANSWER_S: Final = 600.0  # until the next answer
STOP_S: Final = 5.0  # until a team has ended by itself
TAIL: Final = 2000  # characters of a team's output that an error message shows

# What the launcher runs on every rank. It is a text, because a file of this package, run as a
# script, would put the package's folder on the import path.
SCRIPT: Final = "import barepp.bench.teams.barepp_rank\nbarepp.bench.teams.barepp_rank.main()\n"

Answers = list[dict[str, Any]]  # of one turn, by rank


class BenchError(BareppError):
    """A team of a benchmark broke, or computed something else than the others."""


class Team:
    """Processes that train together; each connects to `path` and says its rank."""

    def __init__(self, name: str, size: int, path: Path) -> None:
        self.name = name
        self.size = size
        self._path = path
        self._log = path.with_suffix(".log")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(size)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ends: list[
            int
        ] = []  # of each process a descriptor that is readable when it has ended
        self._members: dict[int, Connection] = {}

    def start(self, module: str, *arguments: str) -> None:
        """Start `python -m MODULE ARGUMENTS... PATH`."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, str(self._path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,  # Ctrl-C is for the conductor alone
            )
        self._processes.append(process)
        self._ends.append(os.pidfd_open(process.pid))

    def gather(self) -> None:
        """Block until every member has connected."""
        deadline = time.monotonic() + START_S
        while len(self._members) < self.size:
            ready = wait([self._listening, *self._ends], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._broken(f"not all of it came within {START_S:g} s")
            if self._listening not in ready:
                raise self._broken("a process of it ended before it came")
            member = Connection(self._listening.accept()[0].detach())
            self._members[member.recv()] = member

    def call(self, method: str, *arguments: Any, **options: Any) -> Answers:
        """Call a method of every member's worker; return what they answer, in rank order."""
        answers: dict[int, Any] = {}
        for member in self._members.values():
            with contextlib.suppress(OSError):  # it has ended: the read says so
                member.send((method, arguments, options))
        ranks = {member: rank for rank, member in self._members.items()}
        while waiting := [member for member, rank in ranks.items() if rank not in answers]:
            ready = wait(waiting, ANSWER_S)
            if not ready:
                raise self._broken(f"no answer after {ANSWER_S:g} s")
            for member in waiting:
                if member in ready:
                    try:
                        answers[ranks[member]] = member.recv()
                    except (EOFError, OSError) as error:
                        raise self._broken(f"rank {ranks[member]} of it has ended") from error
        return [answers[rank] for rank in range(self.size)]

    def train(self, schedule: str, steps: int, **options: str) -> Answers:
        """Run one turn: a step that warms up, and `steps` more."""
        return self.call("train", schedule, steps + 1, **options)

    def _broken(self, why: str) -> BenchError:
        """Return the error for a team that cannot go on, with the end of what it printed."""
        wait(self._ends, STOP_S)  # the launcher prints its report when all its ranks have ended
        printed = self._log.read_text(errors="replace")[-TAIL:].strip()
        return BenchError(f"the {self.name} team broke: {why}\n{printed}".rstrip())

    def stop(self) -> None:
        """Let the processes end; kill those that do not."""
        for member in self._members.values():
            member.close()
        self._listening.close()
        deadline = time.monotonic() + (STOP_S if len(self._members) == self.size else 0)
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill(process)
        for end in self._ends:
            os.close(end)


def step_times(answers: Answers) -> list[float]:
    """Return the seconds of each step but the first, over all ranks of a team.

    A step lasts from the end of the one before, on the rank where that was last, to its own: ranks
    need not be in step, and no time is left out or counted twice.
    """
    ends = [max(column) for column in zip(*(answer["ends"] for answer in answers), strict=True)]
    return [(end - before) / 1e9 for before, end in itertools.pairwise(ends)]


class Conductor:
    """Starts teams, and ends them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="barepp-bench-"))  # readable by its owner only
        self._teams: list[Team] = []

    def start_barepp(self, world_size: int, *flags: str) -> Team:
        """Start ranks with barepp's own launcher."""
        script = self.folder / "barepp_rank.py"
        script.write_text(SCRIPT)
        team = self.team("barepp", world_size)
        team.start("barepp.launch", "--world", str(world_size), *flags, str(script))
        return team

    def start_torch(self, world_size: int) -> Team:
        """Start ranks of torch.distributed over gloo."""
        team = self.team("torch", world_size)
        for rank in range(world_size):
            team.start("barepp.bench.teams.torch_rank", str(world_size), str(rank))
        return team

    def start_alone(self) -> Team:
        """Start one process with the whole model."""
        team = self.team("one-process", 1)
        team.start("barepp.bench.teams.one_process")
        return team

    def team(self, name: str, size: int) -> Team:
        """Return a team that has no processes yet; whatever it starts is ended with the block."""
        team = Team(name, size, self.folder / f"team{len(self._teams)}")
        self._teams.append(team)
        return team

    def gather(self) -> None:
        """Block until every member of every team has connected."""
        for team in self._teams:
            team.gather()

    def __enter__(self) -> Conductor:
        return self

    def __exit__(self, *error: object) -> None:
        for team in self._teams:
            team.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


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
