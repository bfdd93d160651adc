"""The process beside rank 0 that serves the rendezvous when another launcher started the ranks.

    torchrun or srun ── starts ──> rank 0 ── starts ──> this process: rendezvous and referee
                     └─ starts ──> rank 1 … n−1 ── control connections ──────┘

It is a process, and not a thread of rank 0, so that it hears and speaks while rank 0 computes with
Python's lock held, is stopped, or has just died. It sees nobody's process end: whoever is gone
without a goodbye is "lost". It needs no torch, and ends

1. when every rank has come and hung up, which a healthy job brings about by itself;
2. a moment after it has told a failure, so that its port is free when the command runs again;
3. when rank 0 has ended before it ever came.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, Final

from barepp.launch.hang_detector import HangDetector
from barepp.launch.output import EventLog
from barepp.launch.processes.rank_process import Member
from barepp.launch.referee import Hooks, Referee
from barepp.worker.external.secret import give_secret
from barepp.worker.spec import Options
from transport.errors import Failure
from transport.rendezvous.server import RendezvousServer

STAY_S: Final = 2.0  # after a failure has been told, for ranks that are slow to hang up
_TURN_S: Final = 1.0  # the longest wait for an event


class Service:
    """Serves one job until it is over; `parent` is rank 0's process."""

    def __init__(
        self,
        server: RendezvousServer,
        options: Options,
        parent: int,
        *,
        far: bool,
        secret: bytes,
        asked: socket.socket | None,
    ) -> None:
        self._server = server
        self._secret, self._asked = secret, asked
        members = {rank: Member(rank) for rank in range(options.world_size)}
        self._ranks = range(options.world_size)
        self._referee = Referee(
            members,
            HangDetector(self._ranks, options.heartbeat_s, options.timeout_s),
            server,
            EventLog(None),
            Hooks(before_told=self._before_told),
            far=far,
            witnessed=False,
        )
        self._leave_at: float | None = None
        self._parent = os.pidfd_open(parent)
        self._poll = select.poll()
        self._poll.register(self._parent, select.POLLIN)
        self._poll.register(self._referee.fileno(), select.POLLIN)
        if asked is not None:
            self._poll.register(asked, select.POLLIN)

    def run(self) -> None:
        """Block until the job is over."""
        while not self._over():
            deadline = self._referee.next_deadline() or float("inf")
            left = min(max(0.0, deadline - time.monotonic()), _TURN_S)
            ready = [fd for fd, _ in self._poll.poll(left * 1e3)]
            self._referee.poll()
            if self._parent in ready:
                self._poll.unregister(self._parent)
                self._check_parent()
            if self._asked is not None:
                self._answer(self._asked, asks=self._asked.fileno() in ready)

    def _answer(self, asked: socket.socket, *, asks: bool) -> None:
        """Give the job's secret to who asks for it, as long as a rank has not come."""
        if asks:
            give_secret(asked, self._secret)
        if not self._server.unclaimed():
            self._poll.unregister(asked)
            asked.close()
            self._asked = None

    def _over(self) -> bool:
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            return True
        came = 0 not in self._server.unclaimed()
        if self._leave_at is not None and self._server.unclaimed():
            return False  # who is still on the way shall be told as well
        return came and not any(self._server.connected(rank) for rank in self._ranks)

    def _check_parent(self) -> None:
        """Rank 0 has ended. If it had come, its control connection says how."""
        if 0 in self._server.unclaimed():
            message = "rank 0, which served the rendezvous, is gone"
            self._referee.fail(Failure(0, "lost", message))

    def _before_told(self, failure: Failure) -> None:
        self._leave_at = time.monotonic() + STAY_S


def main() -> None:
    """Be that process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks, whose end is ours
    orders: dict[str, Any] = json.load(sys.stdin)
    options = Options(**orders["options"])
    secret, asked = bytes.fromhex(orders["secret"]), orders["asked"]
    with contextlib.ExitStack() as stack:
        server = RendezvousServer(
            options.world_size,
            secret,
            listening=[socket.socket(fileno=fd) for fd in orders["sockets"]],
            join_timeout_s=options.join_timeout_s,
            far=orders["far"],
        )
        stack.callback(server.close)
        try:
            service = Service(
                server,
                options,
                orders["parent"],
                far=orders["far"],
                secret=secret,
                asked=None if asked is None else socket.socket(fileno=asked),
            )
        except ProcessLookupError:  # rank 0 is gone before we have begun
            return
        service.run()


if __name__ == "__main__":
    main()
