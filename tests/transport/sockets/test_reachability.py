"""A peer whose host cannot be reached is lost in time; one that only does not read is not."""

from __future__ import annotations

import time
from collections.abc import Iterator

import far
import pytest
import torch
import transport_worlds as worlds
from hosts import Hosts
from transport_worlds import SOON_S, start

import transport.sockets.peers
from transport.errors import PeerLost, WaitTimeout
from transport.sockets import reachability

pytestmark = pytest.mark.xdist_group("timed")
SILENCE_S = 1.0
LOADED_S = 3.0  # what a machine that does other things too may take longer


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    monkeypatch.setitem(worlds.SOCKETS, "tcp", worlds.SOCKETS["tcp"])  # both are put back
    monkeypatch.setattr(transport.sockets.peers, "dial", transport.sockets.peers.dial)
    try:
        made = far.arrange(0.02)
    except RuntimeError as error:
        pytest.skip(str(error))
    with made:
        yield made


def test_a_host_that_vanishes_is_lost_by_whoever_has_sent_something(hosts: Hosts) -> None:
    with worlds.world("tcp", 2, silence_s=SILENCE_S) as (one, other):
        one.isend(torch.ones(3), 1)
        assert other.recv(0, timeout=SOON_S).sum() == 3
        waiting = [start(lambda: one.recv(1, timeout=SOON_S)) for _ in range(2)]
        hosts.wire(loss=1.0)
        cut = time.monotonic()
        one.isend(torch.ones(3), 1)
        for future in waiting:
            error = future.exception(SOON_S)
            says = "rank 1 cannot be reached: nothing that was sent to it has been acknowledged"
            assert isinstance(error, PeerLost) and f"{says} for 1 s" in str(error)
        lasted_s = time.monotonic() - cut
        assert SILENCE_S <= lasted_s < SILENCE_S * 1.25 + LOADED_S
        with pytest.raises(WaitTimeout):  # rank 1 has sent nothing: it misses nothing either
            other.recv(0, timeout=0.01)


def test_a_receiver_that_does_not_read_is_waited_for(hosts: Hosts) -> None:
    options = {"silence_s": SILENCE_S, "unexpected_limit": 0}
    with worlds.world("tcp", 2, **options) as (one, other):
        other.isend(torch.ones(1), 0)
        one.recv(1, timeout=SOON_S)
        works = [one.isend(torch.full((2**20,), float(n)), 1, n) for n in range(8)]
        with pytest.raises(WaitTimeout):
            works[-1].wait(4 * SILENCE_S)
        for n in reversed(range(8)):
            assert other.recv(0, n, timeout=SOON_S)[-1] == n
        works[-1].wait(SOON_S)


def test_a_wire_that_was_away_for_less_than_the_limit_changes_nothing(hosts: Hosts) -> None:
    with worlds.world("tcp", 2, silence_s=4.0) as (one, other):
        one.isend(torch.ones(3), 1)
        assert other.recv(0, timeout=SOON_S).sum() == 3
        hosts.wire(loss=1.0)
        one.isend(torch.ones(4), 1)
        with pytest.raises(WaitTimeout):
            other.recv(0, timeout=1.0)
        hosts.wire()
        assert other.recv(0, timeout=SOON_S).sum() == 4
        with pytest.raises(WaitTimeout):  # the time before does not count
            one.recv(1, timeout=3.5)


def test_ranks_of_one_host_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[object] = []
    monkeypatch.setattr(reachability, "Reachability", lambda *arguments: watched.append(arguments))
    for name in ("tcp", "unix"):
        with worlds.world(name, 2, silence_s=SILENCE_S) as (one, other):
            one.isend(torch.ones(3), 1)
            other.recv(0, timeout=SOON_S)
    assert not watched
