"""`barepp.run(function, 4)`: a function on several ranks from Python, for notebooks and tests.

def work(world, n):
    return world.rank * n

barepp.run(work, 4, 10)        # [0, 10, 20, 30]
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from barepp.assignment import Call
from barepp.errors import UsageError
from barepp.failures import failure_of
from barepp.job import Job, Options, end_fork_server
from barepp.output import Output
from transport.errors import Failure, JobFailed, WaitTimeout
from transport.registry import check_name

if TYPE_CHECKING:
    from transport.inproc import InprocTransport


def run(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    transport: str = "auto",
    grace: float = 0.5,
    join_timeout: float = 60.0,
) -> list[Any]:
    """Call `function(world, *args)` on every rank and return what each returned, in rank order.

    Over "inproc" the ranks are threads of this process; over every other transport they are
    processes, and results come back pickled over a pipe between parent and child. A function that
    is defined in a script needs that script's `if __name__ == "__main__":` guard, as with
    multiprocessing; one that cannot be imported (in a notebook) is run in forked processes.
    Blocks until all ranks have ended.

    Raises:
        JobFailed: a rank failed; the first cause, with the failing rank's traceback.
        UsageError, UnknownTransport: before anything starts.
    """
    if world_size < 1:
        raise UsageError(f"a world has at least one rank, not {world_size}")
    if check_name(transport) == "inproc":
        return _run_threads(function, world_size, args)
    options = Options(world_size, transport, grace, join_timeout)
    with Output(None, write=_to_streams) as output:
        job = Job(Call(function, args), options, output, fork=not _importable(function))
        outcome = job.run()
        end_fork_server()
    if outcome.failure is not None:
        raise JobFailed(outcome.failure)
    return outcome.results


def _to_streams(target: int, data: bytes) -> None:
    """Print to this process's streams, which a notebook or pytest may have replaced."""
    stream = sys.stdout if target == 1 else sys.stderr
    stream.write(data.decode(errors="replace"))
    stream.flush()


def _importable(function: Callable[..., Any]) -> bool:
    """Whether another process can import the function, or the script that defines it."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None or "<locals>" in getattr(function, "__qualname__", "<locals>"):
        return False
    return module.__name__ != "__main__" or hasattr(module, "__file__")


class _ThreadControl:
    """What the launcher is to processes: hears the first failure, and tells all other ranks."""

    def __init__(self, world_size: int) -> None:
        self.failure: Failure | None = None
        self.tell: list[Callable[[Failure], None]] = []
        self._lock = threading.Lock()
        self._barrier = threading.Barrier(world_size)

    def barrier(self, timeout: float | None = None) -> None:
        """Block until every rank has called."""
        try:
            self._barrier.wait(timeout)
        except threading.BrokenBarrierError:
            if self.failure is not None:
                raise JobFailed(self.failure, "waiting at a barrier") from None
            raise WaitTimeout(f"nothing after {timeout} s of waiting at a barrier") from None

    def report(self, failure: Failure) -> None:
        """Take the first failure as the cause and tell everyone."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        self._barrier.abort()
        for tell in self.tell:
            tell(failure)

    def close(self, *, goodbye: bool = True) -> None:
        """Nothing to hang up."""


def _teller(transport: InprocTransport) -> Callable[[Failure], None]:
    return lambda failure: transport.abort(JobFailed(failure))


def _run_threads(function: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> list[Any]:
    from barepp.world import World, one_compute_thread
    from transport.inproc import InprocHub

    transports = InprocHub(world_size).transports()
    control = _ThreadControl(world_size)
    random_lock = threading.Lock()
    results: list[Any] = [None] * world_size
    control.tell = [_teller(transport) for transport in transports]

    def rank_main(rank: int) -> None:
        one_compute_thread()
        world = World(transports[rank], control, random_lock)
        try:
            with world:
                results[rank] = function(world, *args)
        except BaseException as error:
            if not isinstance(error, JobFailed):
                control.report(failure_of(rank, error, world.position()))

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"barepp-rank-{rank}", daemon=True)
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    with contextlib.suppress(KeyboardInterrupt):
        for thread in threads:
            thread.join()
    if control.failure is not None:
        raise JobFailed(control.failure)
    return results
