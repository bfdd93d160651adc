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
import signal
import socket
import sys
import time
from functools import partial
from typing import Any, Final

from barepp.launch.hang_detector import HangDetector
from barepp.launch.job_state import JobState, Member
from barepp.launch.referee import Hooks, Referee
from barepp.worker.external.secret import give_secret
from barepp.worker.spec import Options
from transport.errors import Failure
from transport.rendezvous.events import Event
from transport.rendezvous.loop import EventLoop
from transport.rendezvous.server import RendezvousServer

STAY_S: Final = 2.0  # after a failure has been told, for ranks that are slow to hang up


class Service:
    """Serves one job until it is over; `parent` is the pidfd of rank 0's process."""

    def __init__(self, orders: dict[str, Any], parent: int) -> None:
        options = Options(**orders["options"])
        self._ranks = range(options.world_size)
        self._secret, far = bytes.fromhex(orders["secret"]), orders["far"]
        self._time_is_up = False
        self._loop = EventLoop()
        watch = HangDetector(self._ranks, options.heartbeat_s, options.timeout_s)
        members = {rank: Member(rank) for rank in self._ranks}
        job = JobState(options, self._loop, watch, members=members)

        self._server = RendezvousServer(
            options.world_size,
            self._secret,
            self._loop,
            self._take,
            listening=[socket.socket(fileno=fd) for fd in orders["sockets"]],
            join_timeout_s=options.join_timeout_s,
            far=far,
        )
        hooks = Hooks(before_told=self._before_told)
        self._referee = Referee(job, self._server, hooks, far=far, witnessed=False)
        self._parent = parent
        self._loop.register(parent, self._on_parent_end)
        self._asked: socket.socket | None = None
        if orders["asked"] is not None:
            self._asked = socket.socket(fileno=orders["asked"])
            self._loop.register(orders["asked"], partial(give_secret, self._asked, self._secret))

    def run(self) -> None:
        """Block until the job is over."""
        while not self._over():
            self._loop.turn()
            if self._asked is not None and not self._server.unclaimed():  # all have the secret
                self._loop.unregister(self._asked.fileno())
                self._asked.close()
                self._asked = None

    def _take(self, event: Event) -> None:
        self._referee.take(event)

    def _over(self) -> bool:
        unclaimed = self._server.unclaimed()
        if self._time_is_up:
            return True
        if self._referee.failure is not None and unclaimed:
            return False  # who is still on the way shall be told as well
        return 0 not in unclaimed and not any(map(self._server.connected, self._ranks))

    def _on_parent_end(self) -> None:
        """Rank 0 has ended. If it had come, its control connection says how."""
        self._loop.unregister(self._parent)
        if 0 in self._server.unclaimed():
            message = "rank 0, which served the rendezvous, is gone"
            self._referee.fail(Failure(0, "lost", message))

    def _before_told(self, failure: Failure) -> None:
        self._loop.call_at(time.monotonic() + STAY_S, self._leave)

    def _leave(self) -> None:
        self._time_is_up = True


def main() -> None:
    """Be that process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks, whose end is ours
    orders: dict[str, Any] = json.load(sys.stdin)
    with contextlib.suppress(ProcessLookupError):  # rank 0 is gone before we have begun
        Service(orders, os.pidfd_open(orders["parent"])).run()


if __name__ == "__main__":
    main()
