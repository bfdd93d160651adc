"""Strangers at the door: they get nothing, fill nothing, and disturb nobody."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transport_worlds as worlds
from transport_worlds import SOON_S, eventually, start

from transport.errors import PeerLost, ProtocolError, TransportClosed
from transport.sockets import addresses, listener
from transport.sockets import peers as call
from transport.sockets.addresses import Address
from transport.sockets.handshake import Hello, Initiator, Role, Verdict, new_secret
from transport.sockets.listener import Listener
from transport.wire.format import MAGIC, FrameKind, encode

SECRET = new_secret()


class Door:
    """A listener with a socket, and strangers who know where it is."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = self.listening.getsockname()
        self.listener = Listener(SECRET, Role.DATA, 1, [self.listening])
        self.strangers: list[socket.socket] = []

    def stranger(self, says: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.address, timeout=SOON_S)
        self.strangers.append(sock)
        if says:
            sock.sendall(says)
        return sock

    def serve(self, seconds: float = 0.05) -> list[tuple[socket.socket, Hello]]:
        """Poll until nothing has happened for `seconds`."""
        authenticated = []
        while select.select([self.listener], [], [], seconds)[0]:
            authenticated += self.listener.poll()
        return authenticated

    def genuine(self, rank: int = 3) -> socket.socket:
        """Come in as a rank of the job."""
        sock = self.stranger()
        initiator = Initiator(SECRET, Hello(Role.DATA, rank, 1))
        sock.sendall(initiator.hello)
        assert self.serve() == []
        sock.sendall(initiator.receive(sock.recv(initiator.needed, socket.MSG_WAITALL)))
        ((accepted, hello),) = self.serve()
        assert hello == Hello(Role.DATA, rank, 1)
        accepted.send(bytes([Verdict.ACCEPTED]))
        initiator.receive(sock.recv(1))
        assert initiator.verdict is Verdict.ACCEPTED
        assert not accepted.getblocking()
        accepted.close()
        return sock


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1000) == b""
    except ConnectionError:
        return True


@pytest.fixture
def door() -> Iterator[Door]:
    before = len(os.listdir("/proc/self/fd"))
    made = Door()
    yield made
    made.listener.close()
    for sock in made.strangers:
        sock.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_genuine_caller_gets_in(door: Door) -> None:
    door.genuine()
    assert door.listener.strangers == 0
    assert door.listener.next_deadline() is None


@pytest.mark.parametrize("seed", range(4))
def test_garbage_gets_no_answer(door: Door, seed: int) -> None:
    rng = random.Random(seed)
    texts = [rng.randbytes(size) for size in (64, 65, 1000, 100_000)]
    texts += [b"GET / HTTP/1.1\r\nHost: example\r\n\r\n".ljust(64), b"\x16\x03\x01" + bytes(200)]
    socks = [door.stranger(text[:60_000]) for text in texts]
    assert door.serve() == []
    assert all(hung_up(sock) for sock in socks)
    assert door.listener.strangers == len(texts)
    door.genuine()


def test_bytes_that_come_one_by_one(door: Door) -> None:
    sock = door.stranger()
    initiator = Initiator(SECRET, Hello(Role.DATA, 0, 1))
    for i in range(64):
        sock.sendall(initiator.hello[i : i + 1])
        assert door.serve(0.002) == []
    proof = initiator.receive(sock.recv(64, socket.MSG_WAITALL))
    for i in range(31):
        sock.sendall(proof[i : i + 1])
        assert door.serve(0.002) == []
    sock.sendall(proof[31:] + b"a frame that follows at once")
    ((accepted, _),) = door.serve()
    assert accepted.recv(100) == b"a frame that follows at once"  # nothing was read too many
    accepted.close()


def test_callers_that_hang_up_or_reset(door: Door) -> None:
    genuine = Initiator(SECRET, Hello(Role.DATA, 0, 1)).hello
    for says in (b"", b"b", genuine[:63], genuine):
        door.stranger(says).close()
        sock = door.stranger(says)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    assert door.serve() == []
    assert door.listener.next_deadline() is None
    door.genuine()


def test_slow_callers_are_dropped_at_their_deadline(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_TIMEOUT_S", 0.1)
    genuine = Initiator(SECRET, Hello(Role.DATA, 0, 1)).hello
    socks = [door.stranger(), door.stranger(genuine[:10]), door.stranger(genuine)]
    assert door.serve(0.01) == []
    deadline = door.listener.next_deadline()
    assert deadline is not None
    assert deadline <= time.monotonic() + 0.1
    time.sleep(max(0.0, deadline - time.monotonic()) + 0.05)
    assert door.listener.poll() == []
    assert door.listener.next_deadline() is None
    assert socks[2].recv(64, socket.MSG_WAITALL)  # it had earned its challenge
    assert all(hung_up(sock) for sock in socks)
    door.genuine()


def test_a_crowd_cannot_fill_the_door(door: Door) -> None:
    limit = listener.MAX_PENDING
    first = door.stranger()
    door.serve()
    crowd = [door.stranger() for _ in range(limit + 40)]
    assert door.serve() == []
    assert len(door.listener._callers) == limit
    assert hung_up(first)  # the oldest gave way
    door.genuine()
    crowd[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        crowd[-1].recv(1)


def test_no_free_descriptor_drops_the_oldest(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    oldest = door.stranger()
    door.serve()
    real = socket.socket.accept

    def no_descriptor(_: socket.socket) -> Any:
        monkeypatch.setattr(socket.socket, "accept", real)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", no_descriptor)
    door.stranger()
    door.serve()
    assert hung_up(oldest)
    door.genuine()


# -- strangers at the port of a transport ----------------------------------------------------------


def port_of(transport: Any) -> tuple[str, int]:
    address: tuple[str, int] = transport._contacts.place.addresses[transport.rank].tcp
    return address


@pytest.mark.parametrize("name", list(worlds.SOCKETS))
def test_strangers_leave_traffic_undisturbed(name: str) -> None:
    rng = random.Random(4)
    with worlds.world(name, 2) as ranks:
        socks = []

        def bother() -> None:
            for i in range(300):
                sock = socket.create_connection(port_of(ranks[i % 2]), timeout=SOON_S)
                sock.sendall(rng.randbytes(rng.choice([1, 63, 64, 500])) or b"x")
                socks.append(sock)
                if rng.random() < 0.5:
                    sock.close()

        def talk(transport: Any) -> None:
            for i in range(300):
                transport.isend(torch.full((2000,), i), 1 - transport.rank)
                got = transport.recv(1 - transport.rank, timeout=SOON_S)
                assert (got == i).all()

        bothering = start(bother)
        talking = [start(lambda t=transport: talk(t)) for transport in ranks]  # type: ignore[misc]
        for future in (bothering, *talking):
            future.result(SOON_S)
        for sock in socks:
            sock.close()


def test_first_contact_through_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers whom the crowd pushes out of the door call again."""
    monkeypatch.setattr(listener, "MAX_PENDING", 2)
    with worlds.world("tcp", 2) as ranks:
        over = False
        socks: list[socket.socket] = []

        def crowd() -> None:
            while not over:
                for rank in ranks:
                    socks.append(socket.create_connection(port_of(rank), timeout=SOON_S))
                while len(socks) > 200:
                    socks.pop(0).close()
            for sock in socks:
                sock.close()

        crowding = start(crowd)
        time.sleep(0.02)
        for transport in ranks:
            transport.isend(torch.tensor(transport.rank), 1 - transport.rank)
        try:
            assert [int(ranks[i].recv(1 - i, timeout=SOON_S)) for i in (0, 1)] == [1, 0]
        finally:
            over = True
            crowding.result(SOON_S)


def test_timers_do_not_pile_up_with_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_TIMEOUT_S", 0.3)
    with worlds.world("tcp", 1) as ranks:
        socks = []
        for _ in range(100):
            socks.append(socket.create_connection(port_of(ranks[0])))
            time.sleep(0.001)
        assert len(ranks[0].progress._timers) <= 2
        eventually(
            lambda: ranks[0]._contacts.listener.strangers == 100
        )  # and all are thrown out in time
        for sock in socks:
            sock.close()


def test_another_secret_is_not_let_in_and_says_so_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "CALL_TIMEOUT_S", 0.3)
    ranks = worlds.make_from_secrets("tcp", [SECRET, SECRET, new_secret()])
    try:
        ranks[2].isend(torch.tensor(1), 0)
        with pytest.raises(PeerLost, match="rank 0 did not answer within"):
            ranks[2].recv(0, timeout=SOON_S)
        ranks[0].isend(torch.tensor(5), 1)
        assert int(ranks[1].recv(0, timeout=SOON_S)) == 5
        assert 2 not in ranks[0]._peers
    finally:
        for transport in ranks:
            transport.abort(TransportClosed("over"))


def test_a_caller_without_a_listener_or_with_a_mute_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "CALL_TIMEOUT_S", 0.3)
    mute = socket.create_server(("127.0.0.1", 0))
    nobody = socket.create_server(("127.0.0.1", 0))
    sockets, mine = worlds.TcpTransport.listen()
    book = {
        0: mine,
        1: Address("elsewhere", "", nobody.getsockname()),
        2: Address("elsewhere", "", mute.getsockname()),
    }
    nobody.close()
    transport = worlds.TcpTransport(0, 3, book, sockets, SECRET)
    try:
        for peer, says in ((1, "refused"), (2, "did not answer")):
            work = transport.isend(torch.tensor(1), peer)
            with pytest.raises(PeerLost, match=f"rank {peer} .*{says}"):
                work.wait(SOON_S)
    finally:
        transport.close(SOON_S)
        mute.close()


# -- peers that have the secret and misbehave ------------------------------------------------------


class Impostor:
    """Rank 1 of a world, by hand: authenticated, and then whatever bytes the test likes."""

    def __init__(self, book: dict[int, Address]) -> None:
        self.sock = addresses.dial(book[0], unix=False)
        self.sock.setblocking(True)
        self.sock.settimeout(SOON_S)
        initiator = Initiator(SECRET, Hello(Role.DATA, 1, 0))
        self.sock.sendall(initiator.hello)
        while initiator.needed:
            data = self.sock.recv(initiator.needed, socket.MSG_WAITALL)
            self.sock.sendall(initiator.receive(data))
        assert initiator.verdict is Verdict.ACCEPTED


GOOD = encode(FrameKind.MESSAGE, 0, [False, "int64", []], 8, tag=3) + (7).to_bytes(8, "little")
SECOND = encode(FrameKind.MESSAGE, 1, [False, "int64", [2]], 16, tag=4) + bytes(16)


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (SECOND[:20], PeerLost, "middle of a frame"),
        (SECOND[:-1], PeerLost, "middle of a frame"),
        (b"", PeerLost, "without a goodbye"),
        (b"garbage" * 10, ProtocolError, "starts with"),
        (MAGIC + b"x" * 44, ProtocolError, "checksum"),
        (GOOD, ProtocolError, "number 1 was due"),
        (encode(FrameKind.RECORD, 1, {}), ProtocolError, "RECORD out of place"),
        (
            encode(FrameKind.LENT, 1, [False, "int64", [2]], 16, tag=4),
            ProtocolError,
            "lends memory",
        ),
        (encode(FrameKind.GOODBYE, 1, None, 5) + b"hello", ProtocolError, "GOODBYE out of place"),
        (encode(FrameKind.MESSAGE, 1, None), ProtocolError, "metadata"),
        (encode(FrameKind.MESSAGE, 1, [False, "int64", [2]], 8), ProtocolError, "16 bytes"),
        (encode(FrameKind.MESSAGE, 1, [False, "int64", [2**37]], 2**40), ProtocolError, "limit"),
    ],
)
@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("asked", ["before", "meanwhile"])
def test_a_peer_that_breaks_off_or_talks_nonsense(
    bad: bytes, kind: type[Exception], says: str, close: bool, asked: str
) -> None:
    """It alone is given up; what it had sent whole stays, and the other peers go on."""
    close = close or kind is PeerLost  # only an end tears a frame
    listening = [worlds.TcpTransport.listen() for _ in range(3)]
    book = {rank: address for rank, (_, address) in enumerate(listening)}
    victim, other = (worlds.TcpTransport(r, 3, book, listening[r][0], SECRET) for r in (0, 2))
    peer = None
    try:
        peer = Impostor(book)
        works = [victim.irecv(1, 4)] if asked == "before" else []
        peer.sock.sendall(GOOD)
        peer.sock.sendall(bad)
        if close:
            peer.sock.close()
        works += [victim.irecv(1, tag) for tag in (4, 9)]
        for work in works:
            with pytest.raises(kind, match=says):
                work.wait(SOON_S)
        assert int(victim.recv(1, 3, timeout=SOON_S)) == 7
        with pytest.raises(kind, match="rank 1"):
            victim.isend(torch.tensor(1), 1)
        assert victim._mailbox.held_nbytes(1) == 0
        other.isend(torch.tensor(11), 0)
        assert int(victim.recv(2, timeout=SOON_S)) == 11
        victim.isend(torch.tensor(12), 2)
        assert int(other.recv(0, timeout=SOON_S)) == 12
    finally:
        if peer is not None:
            peer.sock.close()
        listening[1][0][0].close()
        for transport in (victim, other):
            transport.close(SOON_S)


def test_a_rank_is_claimed_once() -> None:
    """A second caller in the name of a rank that is here gets nothing but a refusal."""
    with worlds.world("tcp", 2) as ranks:
        ranks[1].isend(torch.tensor(1), 0)
        assert int(ranks[0].recv(1, timeout=SOON_S)) == 1
        for claimed in (0, 1, 2, -5):
            sock = socket.create_connection(port_of(ranks[0]), timeout=SOON_S)
            initiator = Initiator(ranks[0]._contacts.place.secret, Hello(Role.DATA, claimed, 0))
            sock.sendall(initiator.hello)
            while initiator.needed:
                data = sock.recv(initiator.needed, socket.MSG_WAITALL)
                sock.sendall(initiator.receive(data))
            assert initiator.verdict is Verdict.TAKEN
            assert hung_up(sock)
            sock.close()
        ranks[1].isend(torch.tensor(2), 0)
        assert int(ranks[0].recv(1, timeout=SOON_S)) == 2


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_a_frame_of_terabytes_from_a_peer_costs_nothing() -> None:
    before = resident_pages()
    test_a_peer_that_breaks_off_or_talks_nonsense(
        encode(FrameKind.MESSAGE, 1, [False, "int8", [2**40]], 2**40),
        ProtocolError,
        "limit",
        False,
        "meanwhile",
    )
    assert resident_pages() - before < 50_000


def test_a_torn_message_does_not_count_as_held() -> None:
    listening = [worlds.TcpTransport.listen() for _ in range(2)]
    book = {rank: address for rank, (_, address) in enumerate(listening)}
    victim = worlds.TcpTransport(0, 2, book, listening[0][0], SECRET)
    peer = Impostor(book)
    peer.sock.sendall(GOOD + SECOND[:-3])
    eventually(lambda: victim._mailbox.held_nbytes(1) == 24)
    peer.sock.close()
    eventually(lambda: victim._peers[1].ended is not None)
    assert victim._mailbox.held_nbytes(1) == 8
    assert int(victim.recv(1, 3, timeout=SOON_S)) == 7
    assert victim._mailbox.held_nbytes(1) == 0
    victim.close(SOON_S)
    listening[1][0][0].close()
