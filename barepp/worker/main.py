"""The process of one rank: what it sets up before the script runs, and how it ends.

1. It reports an exception before anything is torn down, so that no exit handler, no thread and no
   destructor delays the report.
2. After a failure it flushes and leaves by `os._exit`; a healthy end waits for the script's threads
   and runs its exit handlers, as Python does.
3. It does not outlive the launcher: the kernel kills it with its parent, and the end of the
   control connection ends it as well.
4. A process that the script forks is no rank: it has no control connection and reports nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import threading

import transport.sockets.transport  # noqa: F401  (here it is imported once for all forked ranks)
from barepp.errors import UsageError
from barepp.monitor.stacks import tell_stacks
from barepp.worker.exits import fail, flush, leave, report_threads
from barepp.worker.failures import exit_code_of
from barepp.worker.init import connect, init, one_compute_thread
from barepp.worker.process import die_with_parent, leave_terminal
from barepp.worker.process_state import (
    current_world,
    disown,
    leave_world_left_open,
    position,
    process,
)
from barepp.worker.spec import CUT_OFF, LENGTH, Assignment, Call, PickledCall, Pipes, Script, Task
from transport import private_names
from transport.errors import JobFailed, TransportError
from transport.rendezvous.client import ControlClient
from transport.rendezvous.server import DOING_LIMIT


def main(assignment: Assignment, pipes: Pipes) -> None:
    """Be one rank, from the first line of a worker process to its end."""
    membership = assignment.membership
    _let_go_of_the_server()
    die_with_parent(assignment.parent_pid)
    leave_terminal()
    _take_streams(pipes)
    tell_stacks(pipes.asked.fileno(), pipes.stacks.fileno())
    _undo_multiprocessing()
    _forget_exit_handlers()
    one_compute_thread()
    try:
        control = connect(membership)
    except TransportError as error:  # the launcher has gone, or a stranger sits at its port
        print(f"rank {membership.rank}: {error}", file=sys.stderr)
        leave(1)
    last_words = _LastWords(pipes.result.fileno(), control)
    control.on_failure(lambda failure: last_words.end_after(membership.alone_s))
    process.membership, process.control = membership, control
    if (plan := membership.options.fault_plan) is not None:
        from barepp.worker.faults.fault_hook import carry_out

        process.on_told, process.fault_hook = carry_out(membership.rank, plan)
    myself = os.getpid()
    os.register_at_fork(after_in_child=disown)
    report_threads(membership.rank, control)
    try:
        _run(assignment.task, pipes)
        if os.getpid() == myself:
            private_names.join_threads()
            leave_world_left_open()
    except BaseException as error:
        if os.getpid() == myself:
            if isinstance(error, JobFailed):
                last_words.say(error.doing)
            fail(membership.rank, control, error)
        raise
    private_names.run_exit_handlers()  # the fork server ends its children without them
    if os.getpid() == myself:
        control.close()
    flush()


def _run(task: Task, pipes: Pipes) -> None:
    if isinstance(task, Script):
        _run_script(task)
    else:
        result = _run_call(pickle.loads(task.pickled) if isinstance(task, PickledCall) else task)
        with open(pipes.result.fileno(), "wb", closefd=False) as pipe:
            pipe.write(LENGTH.pack(len(result)) + result)


def _run_script(script: Script) -> None:
    sys.argv = [script.path, *script.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script.path)))
    try:
        runpy.run_path(script.path, run_name="__main__")
    except SystemExit as error:
        # Having left the world (or never joined it), a script may end like this as it pleases.
        if exit_code_of(error) != 0 or current_world() is not None:
            raise


def _run_call(call: Call) -> bytes:
    with init() as world:
        result = call.function(world, *call.args)
        try:
            return pickle.dumps(result)
        except Exception as error:
            what = f"what rank {world.rank} returned, a {type(result).__name__},"
            raise UsageError(f"{what} cannot be pickled: {error}") from error


# -- the end --------------------------------------------------------------------------------------


class _LastWords:
    """What a rank that has lost only its control connection says over the pipe for its result.

    A launcher that lives sees an exit code; only the rank knows what it means.
    """

    def __init__(self, fd: int, control: ControlClient) -> None:
        self._fd = fd
        self._control = control
        self._first = threading.Lock()

    def say(self, doing: str) -> None:
        """Say once that the connection has broken; nothing if it has not."""
        if self._control.cut_off and self._first.acquire(blocking=False):
            with contextlib.suppress(OSError):  # the launcher is gone
                os.write(self._fd, LENGTH.pack(CUT_OFF) + doing.encode()[:DOING_LIMIT])

    def end_after(self, seconds: float) -> None:
        """End this process a moment later, because without its launcher nothing else would.

        The moment lets the main thread raise what it was just told. A launcher that is there, and
        has told us of another one's loss, gives us its grace and ends us itself.
        """
        if self._control.cut_off:
            timer = threading.Timer(seconds, self._end)
            timer.daemon = True
            timer.start()

    def _end(self) -> None:
        self.say(position())
        os._exit(1)


# -- the beginning --------------------------------------------------------------------------------


def _let_go_of_the_server() -> None:
    """Close our copy of the descriptor that keeps the fork server, our parent, alive."""
    alive_fd = private_names.fork_server_alive_fd()
    if alive_fd is not None:
        with contextlib.suppress(OSError):
            os.close(alive_fd)


def _forget_exit_handlers() -> None:
    """A process that was forked from a program has a copy of the program's: none of ours to run.

    (One from a fork server has those of the modules that it imported, which are its own.)
    """
    creator = multiprocessing.parent_process()
    if creator is not None and creator.pid == os.getppid():
        private_names.forget_exit_handlers()


def _undo_multiprocessing() -> None:
    """Let the script find Python as it would when run by itself."""
    multiprocessing.set_start_method(None, force=True)  # how data loaders start their workers
    for number in (signal.SIGTERM, signal.SIGHUP):  # a forked rank has inherited the launcher's
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _take_streams(pipes: Pipes) -> None:
    """Put the pipes in the place of stdout and stderr; stdin is at its end."""
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (pipes.stdout.fileno(), 1), (pipes.stderr.fileno(), 2)):
        os.dup2(source, target)
    os.close(null)
    pipes.stdout.close()
    pipes.stderr.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
