"""The TCP worlds of the tests across two network namespaces: `pytest --wire 0.02 -k tcp`.

Ranks stay threads of one process, but their sockets are on the two hosts of hosts.py in turns, and
each call is made from the other host: every message between two ranks crosses the wire.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator

import transport_worlds
from hosts import IPV4, Hosts, enter

import transport.sockets.peers
from transport.sockets.addresses import Address, dial
from transport.sockets.transport import TcpTransport


def arrange(delay_s: float) -> Hosts:
    """Replace the "tcp" of transport_worlds for the rest of the session; return what to leave."""
    hosts = Hosts()
    if hosts.why_not:
        raise RuntimeError(hosts.why_not)
    hosts.wire(delay_s=delay_s)
    turns = itertools.cycle((0, 1))

    class FarTcpTransport(TcpTransport):
        @classmethod
        def listen(cls, bind: str = "127.0.0.1") -> tuple[list[socket.socket], Address]:
            number = next(turns)
            with _within(hosts.nets[number]):
                return super().listen(IPV4[number])

    def far_dial(address: Address, *, unix: bool) -> socket.socket:
        if address.tcp[0] not in IPV4:
            return dial(address, unix=unix)
        with _within(hosts.nets[1 - IPV4.index(address.tcp[0])]):
            return dial(address, unix=False)

    transport_worlds.SOCKETS["tcp"] = FarTcpTransport
    transport.sockets.peers.dial = far_dial
    return hosts


@contextlib.contextmanager
def _within(net: str) -> Iterator[None]:
    """Make sockets in another namespace: which one they are in is decided by who makes them."""
    with open("/proc/thread-self/ns/net") as home:
        enter(net)
        try:
            yield
        finally:
            enter(f"/proc/self/fd/{home.fileno()}")
