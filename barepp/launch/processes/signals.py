"""SIGINT, SIGTERM, SIGHUP for the launcher: told to its loop, not raised in the midst of it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def signals_to(handle: Callable[[int], None], *more: signal.Signals) -> Iterator[None]:
    """Send the three signals, and `more`, to `handle`, as long as the block runs.

    Outside of the main thread signals are not ours. A SIGHUP that is ignored stays so (nohup).
    """
    previous = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *more):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, lambda number, frame: handle(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
