"""How a failed rank exits: report to the launcher, then exit immediately.

What the launcher's own workers and the ranks of other launchers have in common.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading

from barepp.worker.failures import failure_of
from barepp.worker.process_state import position, process
from transport.errors import JobFailed
from transport.rendezvous.client import ControlClient


def fail(rank: int, control: ControlClient, error: BaseException) -> None:
    """Report, unless the error only repeats what the launcher has told us; then exit."""
    if isinstance(error, JobFailed):
        if process.on_told is not None:
            process.on_told(error)
        control.say_doing(error.doing)
        leave(1)
    failure = failure_of(rank, error, position())
    control.report(failure)
    leave(failure.exit_code or 1)


def leave(exit_code: int) -> None:
    """Flush Python's and C's streams and exit without any further teardown."""
    flush()
    os._exit(exit_code)


def flush() -> None:
    """Flush Python's and C's streams."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the script may have closed or replaced them
            stream.flush()
    ctypes.CDLL(None).fflush(None)


def report_threads(rank: int, control: ControlClient, *, show: bool = False) -> None:
    """Let an exception that ends a background thread be this rank's failure as well.

    `show` is for a rank whose launcher does not show the exception.
    """
    usual = threading.excepthook
    myself = os.getpid()

    def on_thread(args: threading.ExceptHookArgs) -> None:
        if os.getpid() != myself:
            usual(args)
        elif args.exc_value is not None and not isinstance(args.exc_value, JobFailed):
            # (A thread that was told of another rank's failure leaves it to the main thread.)
            if show:
                usual(args)
            fail(rank, control, args.exc_value)

    threading.excepthook = on_thread
