"""Ties a process to the one that started it, and unties it from the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import Final

PARENT_PID: Final = "BAREPP_PARENT_PID"  # tells the fork server who starts it
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def die_with_parent(parent_pid: int = 0) -> None:
    """Let the kernel kill this process as soon as its parent has died.

    With `parent_pid` a parent that had died before this call is noticed as well.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid and os.getppid() != parent_pid:
        os._exit(1)


def leave_terminal() -> None:
    """Let Ctrl-C, which reaches every process of the terminal, reach this one no more.

    One that came before, while SIGINT was blocked, is forgotten; from here on it is not blocked.
    """
    with contextlib.suppress(PermissionError):  # it leads a process group already
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # this discards what is pending
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
