"""The process of one rank: what it sets up before the script runs, and how it ends.

1. It reports an exception before anything is torn down, so that no exit handler, no thread and no
   destructor delays the news.
2. After a failure it flushes and leaves by `os._exit`; a healthy end runs its exit handlers.
3. It does not outlive the launcher: the kernel kills it with its parent, and the end of the
   control connection ends it as well.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import pickle
import runpy
import signal
import sys
import threading
import warnings
from multiprocessing import forkserver
from types import TracebackType
from typing import Any, Final

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # before torch comes

from barepp import world as worlds  # noqa: E402
from barepp.assignment import Assignment, Call, Pipes, Script  # noqa: E402
from barepp.failures import exit_code_of, failure_of  # noqa: E402
from transport.control import ControlClient  # noqa: E402
from transport.errors import Failure, JobFailed, TransportError  # noqa: E402

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_LAST_WORDS_S: Final = 1.0  # between the launcher's end and ours


def main(assignment: Assignment, pipes: Pipes) -> None:
    """Be one rank, from the first line of a worker process to its end."""
    membership, task = assignment.membership, assignment.task
    _die_with_parent(assignment.launcher_pid)
    _own_session(pipes)
    worlds.one_compute_thread()
    try:
        control = worlds.connect(membership)
    except TransportError as error:  # the launcher has gone, or a stranger sits at its port
        print(f"rank {membership.rank}: {error}", file=sys.stderr)
        _leave(1)
    control.on_failure(_end_with_launcher)
    worlds.enlist(membership, control)
    _report_uncaught(membership.rank, control)
    try:
        if isinstance(task, Script):
            _run_script(task)
        else:
            pipes.result.send_bytes(pickle.dumps(_run_call(task)))
        _leave_world_left_open()
    except BaseException as error:
        _fail(membership.rank, control, error)
    control.close()
    atexit._run_exitfuncs()  # the fork server ends its children without them


def _run_script(script: Script) -> None:
    sys.argv = [script.path, *script.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script.path)))
    try:
        runpy.run_path(script.path, run_name="__main__")
    except SystemExit as error:
        # Having left the world (or never joined it), a script may end like this as it pleases.
        if exit_code_of(error) != 0 or worlds.current_world() is not None:
            raise


def _run_call(call: Call) -> Any:
    with worlds.init() as world:
        return call.function(world, *call.args)


def _leave_world_left_open() -> None:
    """A script that called init() without `with` leaves here, if it ended well."""
    world = worlds.current_world()
    if world is not None:
        world.close()


def _fail(rank: int, control: ControlClient, error: BaseException) -> None:
    """Report, unless it only repeats what the launcher has told us; then end at once."""
    world = worlds.current_world()
    if not isinstance(error, JobFailed):
        control.report(failure_of(rank, error, world.position() if world is not None else ""))
    elif world is not None:
        control.say_doing(error.doing or world.position())
    _leave(exit_code_of(error) or 1 if isinstance(error, SystemExit) else 1)


def _leave(exit_code: int) -> None:
    """Flush Python's and C's streams and end without any further teardown."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)
    os._exit(exit_code)


def _report_uncaught(rank: int, control: ControlClient) -> None:
    """An exception that ends a background thread is this rank's failure as well."""

    def on_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            _fail(rank, control, args.exc_value)

    def on_main(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        _fail(rank, control, error)

    threading.excepthook = on_thread
    sys.excepthook = on_main


def _end_with_launcher(failure: Failure) -> None:
    """Without the launcher nobody can end this process: do it ourselves, a moment later.

    The moment lets the main thread raise what it was just told.
    """
    if failure.rank < 0 and failure.cause == "lost":
        timer = threading.Timer(_LAST_WORDS_S, os._exit, (1,))
        timer.daemon = True
        timer.start()


def _die_with_parent(launcher: int) -> None:
    # The fork server, our parent, lives as long as somebody holds this descriptor; we inherited it.
    server: Any = forkserver._forkserver
    alive_fd = getattr(server, "_forkserver_alive_fd", None)
    if alive_fd is not None:
        with contextlib.suppress(OSError):
            os.close(alive_fd)
        server._forkserver_alive_fd = None
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.kill(launcher, 0)  # it may have ended before the line above
    except ProcessLookupError:
        os._exit(1)


def _own_session(pipes: Pipes) -> None:
    """Leave the terminal to the launcher: Ctrl-C reaches it alone, and stdin is at its end."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (pipes.stdout.fileno(), 1), (pipes.stderr.fileno(), 2)):
        os.dup2(source, target)
    os.close(null)
    pipes.stdout.close()
    pipes.stderr.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
