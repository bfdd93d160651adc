"""Rendezvous against world size: bare processes that attach, join and meet at barriers.

    python -m barepp.bench.rendezvous_load 64        one line of JSON; `growth` runs it for every
    size

They hold no torch, so dozens of them fit a small machine, and what is measured is the rendezvous.
The server is the launcher's own, served here; each process uses a rank's own control connection.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from barepp.errors import BareppError
from barepp.worker.process import die_with_parent
from transport.rendezvous.client import ControlClient
from transport.rendezvous.events import EventKind
from transport.rendezvous.server import RendezvousServer
from transport.sockets.addresses import Address
from transport.sockets.handshake import new_secret

BARRIERS: Final = 20
LIMIT_S: Final = 120.0
ADDRESS: Final = Address("", "", ("", 0))  # nobody will connect to them


def gather(world_size: int) -> dict[str, Any]:
    """Fork the processes, serve them to their end; return seconds.

    attach_s     from before the first fork until every process has its rank
    join_s       from the word that lets them join until the last one holds the address book
    barrier_s    one barrier, the median of many, on rank 0
    """
    secret = new_secret()
    server = RendezvousServer(world_size, secret)
    go_ends = os.pipe()
    go = os.fdopen(go_ends[1], "wb")  # closing it is the word to join
    result_read, result_write = os.pipe()
    began = time.monotonic()
    # All forks come first: a process that is forked later would hold the earlier ones' connections.
    children = [
        _fork(partial(_be_a_rank, world_size, rank, server.address, secret, go_ends), result_write)
        for rank in range(world_size)
    ]
    os.close(go_ends[0])
    os.close(result_write)
    try:
        _serve(server, EventKind.ATTACHED, world_size)
        attached = time.monotonic()
        go.close()
        _serve(server, EventKind.LEFT, world_size)
    finally:
        go.close()
        server.close()  # whoever is still there ends with it
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        with os.fdopen(result_read) as results:
            told = [json.loads(line) for line in results]
    if any(codes) or len(told) != world_size:
        raise BareppError(f"bare processes ended with {codes}")
    return {
        "world_size": world_size,
        "attach_s": attached - began,
        "join_s": max(line["joined"] for line in told) - attached,
        "barrier_s": next(line["barrier_s"] for line in told if line["rank"] == 0),
    }


def _serve(server: RendezvousServer, awaited: EventKind, count: int) -> None:
    """Serve until so many events of the awaited kind have come."""
    poll = select.poll()
    poll.register(server.fileno(), select.POLLIN)
    deadline = time.monotonic() + LIMIT_S
    while count:
        poll.poll(100)
        for event in server.poll():
            count -= event.kind is awaited
            if event.kind in (EventKind.FAILED, EventKind.LOST, EventKind.REPORTED):
                raise BareppError(f"rank {event.rank} failed: {event.failure}")
        if time.monotonic() > deadline:
            raise BareppError(f"{count} bare processes are missing after {LIMIT_S:g} s")


def _fork(live: Callable[[], dict[str, Any]], result: int) -> int:
    """Return the process id of a child that lives, writes what came of it, and ends."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        die_with_parent(parent)
        line = json.dumps(live()) + "\n"
        os.write(result, line.encode())  # short enough to stay in one piece, pipe(7)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _be_a_rank(
    world_size: int, rank: int, address: tuple[str, int], secret: bytes, go: tuple[int, int]
) -> dict[str, Any]:
    control = ControlClient(address, secret, rank)
    os.close(go[1])
    os.read(go[0], 1)  # returns at the end of the file
    control.join(world_size, ADDRESS, LIMIT_S)
    joined = time.monotonic()
    times = []
    for _ in range(BARRIERS):
        began = time.monotonic()
        control.barrier(LIMIT_S)
        times.append(time.monotonic() - began)
    control.close()
    return {"rank": rank, "joined": joined, "barrier_s": statistics.median(times)}


if __name__ == "__main__":
    print(json.dumps(gather(int(sys.argv[1]))))
