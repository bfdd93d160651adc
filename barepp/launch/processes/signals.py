"""SIGINT, SIGTERM, SIGHUP for the launcher: told to its loop, not raised in the midst of it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def signals_to(handle: Callable[[int], None], *more: signal.Signals) -> Iterator[int]:
    """Send the three signals, and `more`, to `handle`; yield a descriptor that then wakes.

    Outside of the main thread signals are not ours. A SIGHUP that is ignored stays so (nohup).
    """
    wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def on_signal(number: int, frame: object) -> None:
        handle(number)
        os.eventfd_write(wakeup, 1)

    previous = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *more):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, on_signal)
    try:
        yield wakeup
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(wakeup)
