"""`barepp.run(function, 4)`: a function on several ranks from Python, for notebooks and tests.

def work(world, n):
    return world.rank * n

barepp.run(work, 4, 10)        # [0, 10, 20, 30]
"""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any

from barepp.errors import BareppError, UsageError
from barepp.launch.job import Job
from barepp.launch.output import Output
from barepp.launch.processes.rank_process import Rank
from barepp.worker.devices import chosen_device
from barepp.worker.spec import Call, Options, reaches_elsewhere
from transport.errors import JobFailed


def run(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    transport: str = "auto",
    device: str | None = None,
    grace: float = 0.5,
    join_timeout: float = 60.0,
    heartbeat: float = 10.0,
    timeout: float = 300.0,
    checksum: bool = False,
) -> list[Any]:
    """Call `function(world, *args)` on every rank and return what each returned, in rank order.

    Over "inproc" the ranks are threads of this process, and compute in turns; over every other
    transport they are processes, and results come back pickled over a pipe between parent and
    child. A function that is defined in a script needs that script's `if __name__ ==
    "__main__":` guard, as with multiprocessing; what cannot be pickled or imported (a lambda, a
    notebook's function) is run in forked processes. Blocks until all ranks have ended; a thread
    that a failure finds elsewhere than in barepp cannot be ended, and is left behind after `grace`
    seconds. The limits are the launcher's flags of the same names, in seconds; threads have only
    `grace` and `timeout`. `device` is "cpu", "cuda" or "auto", as the launcher's. With `checksum`
    each payload that crosses a socket carries a sum, and a changed bit is an error instead of a
    wrong number; threads have no use for it.

    Raises:
        JobFailed: a rank failed; the first cause, with the failing rank's traceback.
        UsageError, UnknownTransport: before anything starts.
    """
    if type(world_size) is not int or world_size < 1:
        raise UsageError(f"a world has at least one rank, not {world_size!r}")
    limits = grace, join_timeout, heartbeat, timeout
    device = chosen_device(device, transport)
    options = Options(world_size, transport, *limits, checksum, device=device)
    call = Call(function, args)
    if transport == "inproc":
        from barepp.launch.threads import run_threads

        return run_threads(call, options)
    with Output(None, write=_to_streams) as output:
        outcome = Job(call, options, output, fork=not reaches_elsewhere(call)).run()
    if outcome.signal is not None:
        signal.raise_signal(outcome.signal)  # it was meant for the program: Ctrl-C, for example
    if outcome.failure is not None:
        raise JobFailed(outcome.failure)
    return [_result(rank) for rank in outcome.ranks]


def _result(rank: Rank) -> Any:
    pickled = rank.result.result()
    if pickled is None:
        raise BareppError(f"rank {rank.rank} ended well, but its result was cut off")
    try:
        return pickle.loads(pickled)
    except Exception as error:
        text = f"what rank {rank.rank} returned cannot be unpickled here: {error}"
        raise BareppError(text) from error


def _to_streams(target: int, data: bytes) -> None:
    """Print to this process's streams, which a notebook or pytest may have replaced."""
    stream = sys.stdout if target == 1 else sys.stderr
    stream.write(data.decode(errors="replace"))
    stream.flush()
