"""Ties a process to the one that started it, and unties it from the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import Final

PARENT_PID: Final = "BAREPP_PARENT_PID"  # tells the fork server who starts it
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
