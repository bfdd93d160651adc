"""The ports that tests lend each other: free, out of the kernel's reach, and nobody else's."""

from __future__ import annotations

import socket
from pathlib import Path

import ports
import pytest


def test_a_port_is_lent_once_and_never_one_that_the_kernel_hands_out() -> None:
    lent = [ports.free_port() for _ in range(50)]
    assert len(set(lent)) == 50
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(ports.LOWEST < port < max(first, 2 * ports.LOWEST) for port in lent)
    for port in lent[:5]:
        for needed in (port - 1, port):
            socket.create_server(("127.0.0.1", needed)).close()


def test_what_somebody_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, beside, lent = ports.free_port(), ports.free_port(), ports.free_port()
    free = ports.free_port()
    ports._lent.pop().close()  # (given back: it is the only one that will do)

    class Chance:
        def sample(self, *_: object) -> list[int]:
            return [taken, beside, lent, free]

    monkeypatch.setattr(ports.random, "SystemRandom", Chance)
    for _ in range(2):  # of `taken` and `beside` the sockets alone tell that they are not free
        ports._lent.pop(-2).close()
    with (
        socket.create_server(("127.0.0.1", taken)),
        socket.create_server(("127.0.0.1", beside - 1)),
    ):
        assert ports.free_port() == free
