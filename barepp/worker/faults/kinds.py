"""A fault that a test injects on purpose: on which rank, at which action, and what; no torch.

    Fault(rank=2, at=Action.parse("2F3"), when="during", what="SIGKILL", step=0)

what happens                                            and is told to the others as
    "SIGKILL", "SIGSEGV", ...   the process sends itself    signal, exit code 128 + its number
                                the signal
    "exit:7"                    os._exit(7)                 exit, exit code 7 (1 for 0)
    "raise", "raise:NAME"       an exception is raised      exception, exit code 1
    "SIGSTOP"                   the process is stopped      hang, after `heartbeat`; exit code 124
    "hang"                      a loop without an end       hang, after `timeout`; exit code 124
    "delay:2.5"                 seconds of sleep            nothing: the job goes on
"""

from __future__ import annotations

import builtins
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Final

from barepp.errors import UsageError
from barepp.program.actions import Action

WHEN: Final = ("before", "during", "after")
# Signals that end a process which does nothing about them. Not SIGQUIT, which can ask a rank for
# its stack, nor SIGPIPE, which Python ignores.
DEADLY: Final = (
    *("SIGKILL", "SIGTERM", "SIGHUP", "SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE"),
    *("SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU"),
)
_TEXT: Final = "injected by a test"


class InjectedError(Exception):
    """What `raise` raises: on purpose, by a test."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a fault should come to: the cause that every rank is told, and the exit code.

    The cause is empty when the job should go on as if nothing had happened.
    """

    cause: str
    exit_code: int
    words: str = ""  # in the cause's message


@dataclasses.dataclass(frozen=True)
class FaultAction:
    """What is done to a rank, and what should come of it.

    `needs_process` is whether it would reach every rank if these were threads of one process.
    """

    do: Callable[[], None]
    expected: Expected
    needs_process: bool = True


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to which rank, and when; see the top of this file.

    Attributes:
        when: "before": the action's input is here, nothing is computed yet. "during": in the midst
            of its computation. "after": its result is computed and handed to the transport.
        step: which training step of the rank's pipeline, from 0.

    Raises:
        UsageError: no such fault, or no such moment.
    """

    rank: int
    at: Action
    when: str = "during"
    what: str = "SIGKILL"
    step: int = 0

    def __post_init__(self) -> None:
        if self.when not in WHEN:
            raise UsageError(f"a fault happens {', '.join(WHEN)} an action, not {self.when!r}")
        if self.step < 0:
            raise UsageError(f"steps count from 0; there is no step {self.step}")
        fault_action(self.what)

    def __str__(self) -> str:
        return f"{self.what} on rank {self.rank} {self.when} {self.at} of step {self.step}"


def fault_action(what: str) -> FaultAction:
    """Return what `what` says is to be done.

    Raises:
        UsageError: it says nothing that exists; the message lists what does.
    """
    name, colon, detail = what.partition(":")
    if not colon and name in (*DEADLY, "SIGSTOP"):
        number = signal.Signals[name]
        comes = Expected("signal", 128 + number, name)
        if name == "SIGSTOP":
            comes = Expected("hang", 124, "is stopped")
        return FaultAction(lambda: os.kill(os.getpid(), number), comes)
    if what == "hang":
        return FaultAction(_loop, Expected("hang", 124, "no progress"))
    if name == "exit" and detail.isdecimal() and int(detail) < 256:
        code = int(detail)
        return FaultAction(lambda: os._exit(code), Expected("exit", code or 1, f"exit code {code}"))
    if name == "raise" and (not colon or _exception(detail) is not None):
        error = _exception(detail) or InjectedError
        expected = Expected("exception", 1, error.__name__)
        return FaultAction(lambda: _raise(error), expected, needs_process=False)
    if name == "delay" and detail.replace(".", "", 1).isdecimal():
        seconds = float(detail)
        return FaultAction(lambda: time.sleep(seconds), Expected("", 0), needs_process=False)
    raise UsageError(
        f"there is no fault {what!r}; these exist: {', '.join(DEADLY)}, SIGSTOP, hang, raise, "
        "raise:NAME (of an exception of Python's own), exit:CODE (0 to 255), delay:SECONDS"
    )


def _exception(name: str) -> type[BaseException] | None:
    """Return Python's own exception of that name; not SystemExit, which is an exit and no error."""
    found = getattr(builtins, name, None)
    if not isinstance(found, type) or not issubclass(found, (Exception, KeyboardInterrupt)):
        return None
    try:
        found(_TEXT)
    except TypeError:  # UnicodeDecodeError, for example: it wants more than a text
        return None
    return found


def _raise(error: type[BaseException]) -> None:
    raise error(_TEXT)


def _loop() -> None:
    while True:
        pass
