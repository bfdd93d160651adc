"""How the rendezvous grows: many bare processes that attach, join and meet at barriers.

    python -m barepp.bench growth [--sizes 64,256,512] [--rounds 5] [--json PATH]

The processes hold no torch, so hundreds of them fit a small machine, and what is measured is the
rendezvous. The server is the launcher's own; each process uses a rank's own control connection.

    attach      from before the first fork until every process has its rank
    join        from the message that lets them join until the last one holds the address book
    barrier     one barrier, the median of many, on rank 0
    us each     attach, join and barrier together, divided by the number of processes
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import IO, Any, Final

from barepp.bench.figures import table
from barepp.errors import BareppError, UsageError
from barepp.worker.process import die_with_parent
from transport.rendezvous.client import ControlClient
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.loop import EventLoop
from transport.rendezvous.server import RendezvousServer
from transport.sockets.addresses import Address
from transport.sockets.handshake import new_secret

SIZES: Final = "64,256,512"
BARRIERS: Final = 20
LIMIT_S: Final = 120.0
TAIL: Final = 2000  # characters of the processes' errors that an error message shows
PARTS: Final = ("attach", "join", "barrier")
ADDRESS: Final = Address("", "", ("", 0))  # no process connects to another
RESULT: Final = struct.Struct("=idd")  # rank, when it had joined, seconds of a barrier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--sizes", default=SIZES, help=f"numbers of processes ({SIZES})")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each size (5)")


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Let the sizes take turns; show the medians."""
    try:
        sizes = [int(size) for size in arguments.sizes.split(",")]
    except ValueError:
        text = f"--sizes is numbers with commas between, not {arguments.sizes}"
        raise UsageError(text) from None
    if min(sizes) < 1 or arguments.rounds < 1:
        raise UsageError("--sizes and --rounds start at 1")
    turns = [[meet(size) for size in sizes] for _ in range(arguments.rounds)]
    rows = []
    for size, worlds in zip(sizes, zip(*turns, strict=True), strict=True):
        row = {f"{p}_ms": 1e3 * statistics.median(world[p] for world in worlds) for p in PARTS}
        rows.append({"processes": size, **row, "us_each": 1e3 * sum(row.values()) / size})
    for line in table([_line(row) for row in rows]):
        show(line)
    return {"rounds": arguments.rounds, "rows": rows}


def _line(row: dict[str, Any]) -> dict[str, str]:
    titled = {key.replace("_", " "): f"{value:.1f}" for key, value in row.items()}
    return {**titled, "processes": str(row["processes"])}


def meet(world_size: int) -> dict[str, float]:
    """Let so many processes meet; return the seconds of each part."""
    with tempfile.TemporaryFile() as errors:
        try:
            return _meet(world_size, errors)
        except BareppError as error:
            errors.seek(0)
            tail = errors.read().decode(errors="replace")[-TAIL:]
            raise BareppError(f"{world_size} bare processes: {error}\n{tail}".rstrip()) from error


def _meet(world_size: int, errors: IO[bytes]) -> dict[str, float]:
    """Fork the processes and serve them until the last one has left."""
    secret = new_secret()
    loop, seen = EventLoop(), Counter[EventKind]()
    server = RendezvousServer(world_size, secret, loop, partial(_take, seen))
    go_read, go_write = os.pipe()
    go = os.fdopen(go_write, "wb")  # closing it is the message that lets them join
    result_read, result_write = os.pipe()

    def live(rank: int) -> None:
        control = ControlClient(server.address, secret, rank)
        os.close(go_write)
        os.read(go_read, 1)  # returns at the end of the file
        control.join(world_size, ADDRESS, LIMIT_S)
        joined = time.monotonic()
        times = []
        for _ in range(BARRIERS):
            began = time.monotonic()
            control.barrier(LIMIT_S)
            times.append(time.monotonic() - began)
        control.close()
        os.write(result_write, RESULT.pack(rank, joined, statistics.median(times)))

    began = time.monotonic()
    # All forks come first: a later process would hold the connections of the earlier ones.
    children = [_fork(live, rank, errors) for rank in range(world_size)]
    os.close(go_read)
    os.close(result_write)
    try:
        _serve(loop, lambda: seen[EventKind.ATTACHED] == world_size)
        attached = time.monotonic()
        go.close()
        _serve(loop, lambda: seen[EventKind.LEFT] == world_size)
    finally:
        go.close()
        server.close()  # a process that is still there ends with it
        loop.close()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        with os.fdopen(result_read, "rb") as results:
            found = sorted(RESULT.iter_unpack(results.read()))
    if any(codes) or len(found) != world_size:
        raise BareppError(f"their exit codes are {sorted(set(codes))}")
    joined = max(joined for _, joined, _ in found)
    return {"attach": attached - began, "join": joined - attached, "barrier": found[0][2]}


def _fork(live: Callable[[int], None], rank: int, errors: IO[bytes]) -> int:
    """Return the process id of a child that lives as this rank, and ends."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(errors.fileno(), 2)
        die_with_parent(parent)
        live(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _take(seen: Counter[EventKind], event: Event) -> None:
    if event.kind in (EventKind.FAILED, EventKind.LOST, EventKind.REPORTED):
        raise BareppError(f"rank {event.rank} failed: {event.failure}")
    seen[event.kind] += 1


def _serve(loop: EventLoop, done: Callable[[], bool]) -> None:
    """Serve until all processes have come as far as they shall."""
    deadline = time.monotonic() + LIMIT_S
    while not done():
        loop.turn(deadline)
        if time.monotonic() > deadline:
            raise BareppError(f"some are missing after {LIMIT_S:g} s")
