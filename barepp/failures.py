"""How an exception, an exit code or a signal becomes the `Failure` that every rank is told."""

from __future__ import annotations

import traceback

from transport.errors import Failure, signal_name

_OURS = ("barepp/worker.py", "barepp/run.py", "<frozen runpy>")


def failure_of(rank: int, error: BaseException, doing: str = "") -> Failure:
    """Return the failure that `error`, raised in this process, is."""
    if isinstance(error, SystemExit):
        code = exit_code_of(error)
        message = f"it called sys.exit({error.code!r}) before the others had finished"
        return Failure(rank, "exit", message, exit_code=code, doing=doing)
    text = str(error).strip()
    message = type(error).__name__ + (f": {text}" if text else "")
    return Failure(rank, "exception", message, exit_code=1, traceback=formatted(error), doing=doing)


def failure_of_exit(rank: int, exit_code: int, doing: str = "") -> Failure:
    """Return the failure that a process's end is; a negative code is a signal, as in subprocess."""
    if exit_code < 0:
        number = -exit_code
        message = f"it was killed by {signal_name(number)}"
        return Failure(rank, "signal", message, signal=number, doing=doing)
    message = f"its process ended with exit code {exit_code} before the others had finished"
    return Failure(rank, "exit", message, exit_code=exit_code, doing=doing)


def exit_code_of(error: SystemExit) -> int:
    """Return the exit code that Python gives a process that ends by this exception."""
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1


def formatted(error: BaseException) -> str:
    """Return the traceback without the frames of the worker that called the script."""
    trace = traceback.TracebackException.from_exception(error)
    while len(trace.stack) > 1 and trace.stack[0].filename.endswith(_OURS):
        trace.stack.pop(0)
    return "".join(trace.format())
