"""Makes a `Failure`, which every rank is told, of an exception, an exit code or a signal.

What a person reads depends on whose mistake it is:

    a wrong call of ours        the sentence, and the line of the script that made the call;
                                the exit code is then 2, as for wrong usage of a command
    another error of ours       the traceback down to that line
    anything else               the traceback, without the frames that called the script
"""

from __future__ import annotations

import os
import runpy
import traceback
from pathlib import Path
from typing import Final

import transport
from barepp.errors import BareppError, DataError, UsageError
from transport.errors import (
    LATE,
    Failure,
    InvalidArgument,
    PeerLeft,
    PeerLost,
    RendezvousError,
    TransportError,
    is_from_cuda,
    is_late,
    signal_name,
)

_PACKAGES: Final = tuple(
    str(Path(package).resolve()) + os.sep
    for package in (Path(__file__).parents[1], Path(str(transport.__file__)).parent)
)
_CALLERS: Final = (
    *(str(Path(_PACKAGES[0]) / name) for name in ("worker/main.py", "launch/threads.py")),
    runpy.run_path.__code__.co_filename,
)
_SENTENCES: Final = (BareppError, InvalidArgument, RendezvousError)


def failure_of(rank: int, error: BaseException, doing: str = "") -> Failure:
    """Return the failure that `error`, raised in this process, is."""
    if isinstance(error, SystemExit):
        code = exit_code_of(error)
        message = f"it called sys.exit({error.code!r:.200})"
        message += "" if code else " before it had left the world"
        return Failure(rank, "exit", message, exit_code=code, doing=doing)
    cause = "exception"
    if isinstance(error, (PeerLost, PeerLeft)):
        cause = "lost"  # a consequence, most likely: the launcher will know better
    elif isinstance(error, RendezvousError):
        cause = "rendezvous"
    text = _text_of(error)
    if isinstance(error, _SENTENCES) and text:
        code = 2 if isinstance(error, (UsageError, DataError, InvalidArgument)) else 1
        return Failure(rank, cause, text + _place(error), exit_code=code, doing=doing)
    message = type(error).__name__ + (f": {text}" if text else "")
    if is_from_cuda(error) and is_late(str(error)):  # it showed in the script, in a call of torch's
        message += f"\n({LATE})"
    return Failure(rank, cause, message, exit_code=1, traceback=formatted(error), doing=doing)


def failure_of_exit(
    rank: int, exit_code: int, doing: str = "", *, joined: bool = True, heard: str = ""
) -> Failure:
    """Return the failure that a process's end is; a negative code is a signal, as in subprocess.

    `heard` is what it last said that it was doing, and how long before its end.
    """
    last = f" (last heard: {heard})" if heard else ""
    if exit_code < 0:
        number = -exit_code
        message = f"it was killed by {signal_name(number)}{last}"
        return Failure(rank, "signal", message, signal=number, doing=doing)
    when = "before it had left the world" if joined else "without having joined the others"
    message = f"its process ended with exit code {exit_code}"
    message += (f" {when}" if exit_code == 0 else "") + last
    return Failure(rank, "exit", message, exit_code=exit_code, doing=doing)


def failure_of_cut_off(rank: int, doing: str) -> Failure:
    """Return the failure of a rank that ended because it had lost its control connection alone."""
    message = "its control connection to the launcher broke, and no rank goes on without that"
    return Failure(rank, "lost", message, exit_code=1, doing=doing)


def exit_code_of(error: SystemExit) -> int:
    """Return the exit code that a process gets which ends by this exception: 0 ... 255."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def formatted(error: BaseException) -> str:
    """Return the traceback without the frames that called the script.

    An error that we raise on purpose is shown from the script's side: without our own frames at
    its end.
    """
    trace = traceback.TracebackException.from_exception(error)
    while len(trace.stack) > 1 and trace.stack[0].filename in _CALLERS:
        trace.stack.pop(0)
    if isinstance(error, (BareppError, TransportError)):
        while len(trace.stack) > 1 and _is_ours(trace.stack[-1].filename):
            trace.stack.pop()
    return "".join(trace.format())


def _text_of(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception as broken:  # its __str__ is the script's code
        return f"(its text cannot be shown: {type(broken).__name__})"


def _place(error: BaseException) -> str:
    """Return " (demos/x.py, line 12)", where the script called us; empty when it did not."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_ours(frame.filename) and frame.filename not in _CALLERS:
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _is_ours(filename: str) -> bool:
    return filename.startswith(_PACKAGES)
