"""Ports for those that listen later: below the ones that the kernel hands out, each lent once.

A free port that the kernel names is one that it may give to anybody's next connection, and on a
machine that is busy it does, before the test's own process has come to listen there.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

LOWEST = 10_000
_lent: list[socket.socket] = []  # abstract Unix names: they say it to other tests on this machine


def free_port() -> int:
    """Return a port at which nobody listens, nor at the one below it, which torchrun may want."""
    handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    below = handed_out if handed_out > 2 * LOWEST else 2 * LOWEST
    ports = range(LOWEST + 1, below, 2)
    for port in random.SystemRandom().sample(ports, len(ports)):
        with contextlib.suppress(OSError), _lending(port):
            for needed in (port - 1, port):
                socket.create_server(("", needed)).close()
            return port
    raise OSError(f"no port from {ports[0]} to {ports[-1]} is free")


@contextlib.contextmanager
def _lending(port: int) -> Iterator[None]:
    """Take the name for this port, until the process ends; give it back when it does not do."""
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0barepp-test-port-{port}")
        yield
    except OSError:
        name.close()
        raise
    _lent.append(name)
