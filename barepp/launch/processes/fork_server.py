"""Where the ranks' processes come from: a fork server that imports torch once, or this process.

multiprocessing has a fork server but only one a program, which cannot be ended. A job needs one
of its own: it must not disturb another job, nor the program that calls `barepp.run`. Python has no
documented way to make one; what is used instead stands in transport/private_names.py.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import inspect
import multiprocessing
import os
import shutil
import signal
import tempfile
import termios
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.context import ForkContext, ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from barepp.worker.process import PARENT_PID
from barepp.worker.spec import Call, Script, Task
from transport import private_names

PRELOAD: Final = ["barepp.launch.processes.preload"]

REQUEST_FDS: Final = 8  # a request takes five, for a moment; `Job._start` keeps seven after it

_borrowing = threading.Lock()  # held while something that all jobs share is replaced

# Held while this process forks: filelock, which torch imports, refuses the fork of a second thread
# at that time (4.3). Reentrant, for a forked rank that starts a job: its thread seems to hold it.
_forking = threading.RLock()


class ForkServer:
    """Makes and starts the processes of one job; `end` leaves nothing of it behind.

    `preloads` are modules that the fork server imports besides what every rank needs.
    """

    def __init__(self, preloads: Sequence[str] = (), *, fork: bool) -> None:
        self._fork = fork
        self._server: Any = None
        self._folder = contextlib.ExitStack()  # the folder of the server's socket
        self.context: ForkContext | ForkServerContext
        if fork:
            self.context = multiprocessing.get_context("fork")
            return
        self.context = multiprocessing.get_context("forkserver")
        modules = [*PRELOAD, *preloads]
        self._server = private_names.new_fork_server()
        if self._server is not None:
            self._server.set_forkserver_preload(modules)
            with _blocked(signal.SIGQUIT):  # (by itself, because it unblocks SIGINT)
                resource_tracker.ensure_running()
            deaf = _blocked(signal.SIGINT, signal.SIGQUIT)
            folder = private_names.sockets_in(self._own_folder)
            try:
                with _borrowing, folder, _own_pid_in_environment(), deaf:
                    self._server.ensure_running()
            except BaseException:
                self.remove_folder()
                raise
        else:
            self.context.set_forkserver_preload(modules)

    @property
    def parent_pid(self) -> int:
        """The process id of the ranks' parent; 0 when nobody knows it."""
        return os.getpid() if self._fork else private_names.fork_server_pid(self._server)

    def start(self, process: BaseProcess) -> None:
        """Start a process that was made with `context`; the first one waits for torch's import."""
        if self._server is None:
            with _forking:
                process.start()
            return
        with _borrowing, private_names.starting_from(self._server):
            _be_sure_of_descriptors()
            process.start()

    def end_descriptor(self, process: BaseProcess) -> int:
        """Return a new descriptor that is readable once the process has ended.

        A forked process's own sentinel is held open by whatever the rank has forked in turn.
        """
        if self._fork and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # a kernel without it
                assert process.pid is not None
                return os.pidfd_open(process.pid)
        return os.dup(process.sentinel)

    def remove_folder(self) -> None:
        """Remove the server's socket from the disk; no process can be started any more."""
        self._folder.close()

    def tells_nothing(self, ended_fd: int) -> bool:
        """Whether the fork server has died, told by the end of a process that it started.

        The server writes how a process ended into that process's pipe (`ended_fd`, readable now). A
        pipe at its end with nothing in it is the server's own end. (Whether that can be waited for
        yet is another question: the kernel closes a dying process's descriptors before.)
        """
        if self._fork:
            return False
        unread = fcntl.ioctl(ended_fd, termios.FIONREAD, bytes(4))
        return not any(unread)

    def end(self) -> None:
        """End the fork server now.

        It would leave by itself when we do, but only after torch's teardown, up to a second later.
        """
        if pid := private_names.fork_server_pid(self._server):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            private_names.stop_fork_server(self._server)
        self.remove_folder()

    def _own_folder(self) -> str:
        """Make the folder of the server's socket, which we can remove before the job ends.

        A socket's path has at most 107 bytes (unix(7)), and that of the temporary folder may be
        longer. So the path begins with a descriptor of our folder.
        """
        folder = tempfile.mkdtemp(prefix="pymp-barepp-")
        self._folder.callback(shutil.rmtree, folder, ignore_errors=True)
        folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._folder.callback(os.close, folder_fd)
        return f"/proc/self/fd/{folder_fd}"


def _be_sure_of_descriptors() -> None:
    """Raise what a lack of file descriptors raises, before the server has heard of anything.

    A request that breaks off in the middle ends the server, with a traceback (until Python 3.13).
    """
    with contextlib.ExitStack() as taken:
        for _ in range(REQUEST_FDS):
            taken.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


@contextlib.contextmanager
def _own_pid_in_environment() -> Iterator[None]:
    os.environ[PARENT_PID] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT_PID, None)


@contextlib.contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    """Start processes with these signals of the terminal blocked: they are for the launcher alone.

    The server unblocks them when it has left the terminal. Until then Ctrl-C would make it print a
    traceback, and Ctrl-\\ kill it. What comes here meanwhile comes afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What the ranks will import, seen from the script's text, so that the fork server does it once.
#
# An optimizer imports much at its first use, which takes as long as importing torch
# itself. Done by every rank that is seconds for each; done before the ranks are forked it is once
# for all. A script without an optimizer should not wait for it at all. So the text is asked: the
# script's own, and that of the modules beside it that it imports. Where that misleads, a rank
# imports it itself.

OPTIMIZERS: Final = "optim"  # as in torch.optim.Adam


def preloads(task: Task) -> list[str]:
    """Return the modules that are worth importing before the ranks are forked."""
    path = task.path if isinstance(task, Script) else None
    if isinstance(task, Call):
        with contextlib.suppress(TypeError):  # a callable object, a partial
            path = inspect.getsourcefile(task.function)
    mentioned = path is not None and _mentions(Path(path), OPTIMIZERS, set())
    return [private_names.IMPORTED_BY_OPTIMIZERS] if mentioned else []


def _mentions(path: Path, word: str, seen: set[Path]) -> bool:
    """Whether the word is in a Python file, or in one beside it that it imports."""
    seen.add(path)
    try:
        text = path.read_text()
        if word in text:
            return True
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):  # who runs it will say so
        return False
    beside = (path.parent / f"{name}.py" for name in _imported(tree))
    return any(_mentions(other, word, seen) for other in beside if other not in seen)


def _imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}
