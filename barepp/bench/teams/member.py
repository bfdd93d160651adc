"""One process of a team: it waits until the conductor calls a method of its worker, and answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from typing import Any


def serve(path: str, rank: int, worker: object) -> None:
    """Connect to the conductor at `path` and do what it calls until it closes the connection."""
    with Client(path) as conductor:
        conductor.send(rank)
        with contextlib.suppress(EOFError):
            while True:
                method, arguments, options = conductor.recv()
                conductor.send(getattr(worker, method)(*arguments, **options))


def timed(steps: int, prepare: Callable[[], None], step: Callable[[], object]) -> dict[str, Any]:
    """Return when each step ended, and the CPU time of all this process's threads.

    The clock is the machine's (CLOCK_MONOTONIC, `time.perf_counter_ns` on Linux), so the times of
    several processes can be compared.
    """
    ends = []
    used = time.process_time()
    for _ in range(steps):
        prepare()
        step()
        ends.append(time.perf_counter_ns())
    return {"ends": ends, "cpu_s": time.process_time() - used}
