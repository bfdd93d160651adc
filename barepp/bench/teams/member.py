"""One process of a team: blocked until the conductor says what to do, then does it and answers.

Orders and answers are JSON objects, one a line, over a Unix socket in the conductor's own folder:

    -> {"team": 0, "rank": 2}                               who this is
    <- {"order": "build", "case": {...}}                    -> {}
    <- {"order": "train", "schedule": "1f1b", "steps": 9}   -> {"starts": [...], "ends": [...], ...}
    <- {"order": "stop"}

A member whose conductor is gone ends: it reads the end of the stream.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from barepp.bench.case import Case


class Worker(Protocol):
    """Trains a case, alone or as one rank of several."""

    def build(self, case: Case) -> None:
        """Forget the last case and build this one."""

    def train(self, schedule: str, steps: int) -> dict[str, Any]:
        """Run steps; answer with what `timed` gives, and what this kind of worker adds."""


def timed(steps: int, prepare: Callable[[], None], step: Callable[[], object]) -> dict[str, Any]:
    """Return when each step started and ended, and the CPU time of all this process's threads.

    The clock is the machine's (CLOCK_MONOTONIC, `time.perf_counter_ns` on Linux), so the times of
    several processes can be compared.
    """
    starts, ends = [], []
    used = time.process_time()
    for _ in range(steps):
        prepare()
        starts.append(time.perf_counter_ns())
        step()
        ends.append(time.perf_counter_ns())
    return {"starts": starts, "ends": ends, "cpu_s": time.process_time() - used}


def serve(path: str, team: int, rank: int, worker: Worker) -> None:
    """Obey the conductor at `path` until it says stop, as one of the team of that number."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        with sock.makefile("rw") as stream:
            _answer(stream, {"team": team, "rank": rank})
            for line in stream:
                arguments = json.loads(line)
                order = arguments.pop("order")
                if order == "stop":
                    return
                if order == "build":
                    worker.build(Case(**arguments["case"]))
                    _answer(stream, {})
                else:
                    _answer(stream, getattr(worker, order)(**arguments))


def _answer(stream: Any, record: dict[str, Any]) -> None:
    stream.write(json.dumps(record) + "\n")
    stream.flush()
