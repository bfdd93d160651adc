"""Counts what a job could leave behind: processes, threads, descriptors, shared memory."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Collection
from multiprocessing import resource_tracker
from typing import Final

import psutil

PATIENCE_S: Final = 2.0  # the kernel may take a moment to end a process that was killed
_STEP_S: Final = 0.02


class LeakCheck:
    """What this process has when it is made; `leftovers` says what there is more of later.

    Ranks lead sessions of their own (setsid(2)), and what a rank starts stays in its session, even
    when its parent has ended: so a rank's process id finds that as well. What has made itself a
    session of its own, as daemons do, is not found.
    """

    def __init__(self) -> None:
        resource_tracker.ensure_running()  # multiprocessing's; it stays for the life of a program
        gc.collect()  # what was left to the collector before is not ours
        self._before = _count(())

    def leftovers(self, rank_pids: Collection[int] = ()) -> list[str]:
        """Return what there is more of than before, once that has had a moment to go."""
        deadline = time.monotonic() + PATIENCE_S
        while (more := self._more(rank_pids)) and time.monotonic() < deadline:
            time.sleep(_STEP_S)
        return more

    def _more(self, rank_pids: Collection[int]) -> list[str]:
        after = _count(rank_pids)
        more = [
            f"{kind}: {found}"
            for kind, before in self._before.items()
            for found in sorted(after[kind] - before)
            # The number of a descriptor is used again, so it is their count that matters.
            if kind != "descriptor" or len(after[kind]) > len(before)
        ]
        return more + [f"process: {pid}" for pid in _in_sessions(rank_pids)]


def _count(rank_pids: Collection[int]) -> dict[str, set[str]]:
    ours = ("barepp", *(f"torch_{pid}_" for pid in (os.getpid(), *rank_pids)))
    children = psutil.Process().children(recursive=True)
    return {
        "thread": {thread.name for thread in threading.enumerate()},
        "descriptor": set(_descriptors()),
        "child process": {str(child.pid) for child in children},
        "shared memory": {name for name in os.listdir("/dev/shm") if name.startswith(ours)},
    }


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them is closed again
            found.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found


def _in_sessions(leaders: Collection[int]) -> list[int]:
    """Return the processes that live in the sessions of these leaders."""
    found = []
    for pid in psutil.pids() if leaders else ():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) in leaders and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found
