"""Ties a process to the one that started it, and unties it from the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import Final

PARENT_PID: Final = "BAREPP_PARENT_PID"  # tells the fork server its parent's process id
_KEYBOARD: Final = (signal.SIGINT, signal.SIGQUIT)  # Ctrl-C and Ctrl-\
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def die_with_parent(parent_pid: int = 0) -> None:
    """Let the kernel kill this process as soon as its parent has died.

    With `parent_pid` a parent that had died before this call is noticed as well.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid and os.getppid() != parent_pid:
        os._exit(1)


def leave_terminal() -> None:
    r"""Let Ctrl-C and Ctrl-\, which reach every process of the terminal, reach this one no more.

    One that came before, while they were blocked, is forgotten; from here on they are not blocked.
    """
    with contextlib.suppress(PermissionError):  # it leads a process group already
        os.setsid()
    for number in _KEYBOARD:
        signal.signal(number, signal.SIG_IGN)  # this discards what is pending
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEYBOARD)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


# Keeps freed memory in the process, because touching memory for the first time costs far more.
#
# A training step frees and allocates the same few sizes again and again. glibc gives blocks above a
# threshold straight back to the kernel, and every page of the next one is a page fault (8227 of
# them in five steps of a 1024-wide MLP, 2 with this). See mallopt(3). Where the C library is
# another one, nothing happens.

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_THRESHOLD: Final = 32 * 1024 * 1024  # glibc's own upper limit; larger blocks are mapped
_NEVER: Final = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees; its peak stays its size."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


# Lets ranks that share cores compute on when a message wakes another one.
#
# A rank that sends wakes its neighbour. Where there are more ranks than cores, Linux often lets the
# one that was woken take the sender's core at once: the sender stops in the midst of its next
# action, and both find the caches full of the other's data. Under SCHED_BATCH a thread that wakes
# waits until the one that runs waits or has had its share: "without interactivity causing extra
# preemptions (between the workload's tasks)", sched(7). Among themselves the shares stay as they
# were.
#
# Where every rank has a core of its own, nothing is done: there it could only come late. Cores are
# those that the process may run on; a quota of their time (cgroups) is not looked at. What a rank
# starts, such as a DataLoader's processes, is scheduled as the rank is.


def compute_in_turns(ranks_on_host: int) -> None:
    """Let the calling thread, and those that it will start, push no other thread off a core.

    Only if this host has more ranks than cores for them. A policy that was
    chosen before stays; where the system has no such policy, or forbids it, nothing changes.
    """
    if not hasattr(os, "SCHED_BATCH") or ranks_on_host <= len(os.sched_getaffinity(0)):
        return
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
