"""Finds the running jobs of this user and asks their launchers; the other side of status_socket.py.

Every user may give a socket any abstract name. So the client checks, with the kernel's help, that
the process that answers belongs to this user.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final, NamedTuple

from barepp.errors import BareppError, JobEnded, NobodyAnswers
from barepp.monitor.status import JobStatus, RankStatus
from barepp.monitor.status_socket import peer_of, socket_prefix
from transport.wire.records import RecordStream

ANSWER_S: Final = 30.0  # a launcher answers at once but while it starts; one that is stopped, never
LISTING_S: Final = 1.0
_LISTENS: Final = 0x10000  # __SO_ACCEPTCON, in the column of flags


class SocketName(NamedTuple):
    """A job's status socket: the launcher's process id, and a token that makes it unique."""

    pid: int
    token: str

    def __str__(self) -> str:
        return f"{self.pid}-{self.token}"


def socket_names() -> list[SocketName]:
    """Return the names of this user's status sockets, as the kernel lists them (proc(5))."""
    try:
        lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]
    except OSError as error:
        raise NobodyAnswers(f"the list of sockets cannot be read: {error}") from error
    prefix = "@" + socket_prefix(os.getuid())
    found = []
    for line in lines:
        columns = line.split(maxsplit=7)  # address, references, protocol, flags, ..., name
        if len(columns) == 8 and columns[7].startswith(prefix) and int(columns[3], 16) & _LISTENS:
            pid, _, token = columns[7].removeprefix(prefix).partition("-")
            if pid.isdecimal():
                found.append(SocketName(int(pid), token))
    return sorted(found)


class Line:
    """A connection to the launcher of a job.

    `name` is that of its status socket; `launcher_pid` the launcher's process id as this process
    sees it, 0 when that lives in another pid namespace, whose numbers mean nothing here.

    Raises:
        NobodyAnswers: no process is there, or one of another user.
    """

    def __init__(self, name: SocketName) -> None:
        self.name = name
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)
            try:
                sock.connect(f"\0{socket_prefix(os.getuid())}{name}")
                self.launcher_pid, uid = peer_of(sock)
            except OSError as error:
                why = f"job {name.pid} cannot be asked: {error.strerror or error}"
                raise NobodyAnswers(why) from error
            if uid != os.getuid():
                raise NobodyAnswers(f"what answers for job {name} is a process of user {uid}")
            stack.pop_all()
        self._stream = RecordStream(sock)

    def status(self, timeout: float = ANSWER_S) -> tuple[JobStatus, list[RankStatus]]:
        """Ask for the state of the job and of its ranks; `timeout` is in seconds."""
        job, *ranks = self._ask("status", timeout) or [{}]
        return JobStatus.from_record(job), [RankStatus.from_record(rank) for rank in ranks]

    def stacks(self) -> tuple[str, dict[int, str]]:
        """Ask which rank waits for which, and for the Python stacks; takes up to some seconds."""
        match self._ask("stacks"):
            case [{"record": "graph", "text": str(graph)}, *stacks]:
                with contextlib.suppress(KeyError):
                    return graph, {stack["rank"]: str(stack["text"]) for stack in stacks}
        raise BareppError(f"job {self.name.pid} tells of stacks what makes no sense")

    def _ask(self, question: str, timeout: float = ANSWER_S) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        deadline = time.monotonic() + timeout
        with contextlib.suppress(OSError):  # then its end is there to be read
            self._stream.send({"record": question})
        while True:
            if not wait([self._stream.socket], deadline - time.monotonic()):
                why = f"does not answer within {timeout:g} s: is its launcher stopped?"
                raise NobodyAnswers(f"job {self.name.pid} {why}")
            more, goes_on = self._stream.receive()
            records += more
            if records and records[-1]["record"] == "end":
                return records[:-1]
            if not goes_on:
                why = f": {self._stream.error}" if self._stream.error is not None else ""
                raise JobEnded(f"job {self.name.pid} has ended{why}")

    def close(self) -> None:
        """Close the connection."""
        self._stream.socket.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def add_job_argument(parser: argparse.ArgumentParser) -> None:
    """Let a command line name the job that `line_to` is to find."""
    parser.add_argument(
        "job",
        nargs="?",
        default="",
        metavar="PID",
        help="the process id of the job's launcher; needed when several jobs are running",
    )


def line_to(wanted: str = "") -> Line:
    """Return a line to the job that is wanted: "" for the only one, else its number in the list.

    Raises:
        NobodyAnswers: there is none, or more than one; then the message lists them.
    """
    names = [name for name in socket_names() if wanted in ("", str(name), str(name.pid))]
    lines = []
    for name in names:
        with contextlib.suppress(NobodyAnswers):  # it has just ended, or was never one of ours
            lines.append(Line(name))
    if len(lines) == 1:
        return lines[0]
    if not lines:
        which = f"{wanted} " if wanted else ""
        raise NobodyAnswers(f"no job {which}of this user is running on this machine")
    try:
        pids = [line.name.pid for line in lines]
        told = [_listed(line, unique=pids.count(line.name.pid) == 1) for line in lines]
    finally:
        for line in lines:
            line.close()
    head = "several jobs are running; choose one by its number:"
    raise NobodyAnswers("\n".join([head, *told]))


def _listed(line: Line, *, unique: bool) -> str:
    number = str(line.name.pid if unique else line.name)
    try:
        job, _ = line.status(LISTING_S)
    except BareppError as error:
        return f"  {number}   ({error})"
    return f"  {number}   {job.task}, {job.world_size} ranks"
