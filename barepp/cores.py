"""Lets ranks that share cores compute on when a message wakes another one.

A rank that sends wakes its neighbour. Where there are more ranks than cores, Linux often lets the
one that was woken take the sender's core at once: the sender stops in the midst of its next action,
and both find the caches full of the other's data. Under SCHED_BATCH a thread that wakes waits until
the one that runs waits or has had its share: "without interactivity causing extra preemptions
(between the workload's tasks)", sched(7). Among themselves the shares stay as they were.

Where every rank has a core of its own, nothing is done: there it could only come late. Cores are
those that the process may run on; a quota of their time (cgroups) is not looked at. What a rank
starts, such as a DataLoader's processes, is scheduled as the rank is.
"""

from __future__ import annotations

import contextlib
import os


def compute_in_turns(ranks_on_host: int) -> None:
    """Let the calling thread, and those that it will start, push nobody off a core.

    Only if this host has more ranks than cores for them. A policy that somebody has chosen stays,
    and where the system has no such policy, or forbids to choose it, all stays as it is.
    """
    if not hasattr(os, "SCHED_BATCH") or ranks_on_host <= len(os.sched_getaffinity(0)):
        return
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
