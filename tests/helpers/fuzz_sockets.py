"""What reads bytes from a socket, each part as a function of a seeded random source.

As in fuzz_targets.py; here the other side holds the secret, or not, and says anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgpack
import transport_worlds as worlds
from fuzz_targets import LIMITS, RECORDS, SECRET, assert_shown
from mutations import EDGES, altered, changed, cut, frame, message_meta, packed, stream

from transport.errors import InternalError, ProtocolError, TransportClosed, TransportError
from transport.message.specs import MessageSpec
from transport.rendezvous.loop import EventLoop
from transport.rendezvous.server import EventKind, RendezvousServer
from transport.shm.arena import ALIGNMENT
from transport.sockets.addresses import Address
from transport.sockets.handshake import ANY_RANK, Hello, Initiator, Role, Verdict
from transport.sockets.listener import Listener
from transport.torch_dist.transport import hear
from transport.wire.format import OFF_STREAM, FrameKind, Packed, encode
from transport.wire.records import RecordStream

PATIENCE_S: Final = 20.0


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        caller = socket.create_connection(listening.getsockname())
        return caller, listening.accept()[0]


def records(rng: random.Random) -> bool:
    """What stands before the nonsense is returned, and nothing after it."""
    data = stream(rng, [FrameKind.RECORD], RECORDS)
    theirs, ours = socket_pair()
    with theirs, ours:
        ours.setblocking(False)
        reader = RecordStream(ours)
        goes_on = True
        for piece in cut(rng, data)[:50]:
            theirs.sendall(piece)
            if not select.select([ours], [], [], PATIENCE_S)[0] or not goes_on:
                break
            found, goes_on = reader.receive()
            assert all(isinstance(record["record"], str) for record in found)
            assert goes_on == (reader.error is None)
    return reader.error is None


def notes(rng: random.Random) -> bool:
    """A note is refused, or is a key and a value; what follows it stays on the socket."""
    meta = packed(rng, altered(rng, ["key", rng.randbytes(rng.randrange(200))]))
    said = encode(FrameKind.RECORD, 0, Packed(meta, zlib.crc32(meta)))
    if rng.random() < 0.5:
        said = changed(rng, said)
    theirs, ours = socket_pair()
    with theirs, ours:
        theirs.sendall(said + b"rest")
        theirs.shutdown(socket.SHUT_WR)
        ours.settimeout(PATIENCE_S)
        try:
            key, value = hear(ours)
        except (ProtocolError, ConnectionError):
            return False
        assert isinstance(key, str) and isinstance(value, bytes)
        return ours.recv(100).endswith(b"rest")


def knock(sock: socket.socket, serve: Callable[[], Any], hello: Hello) -> socket.socket:
    """Come in as one who holds the secret; `serve` lets the listener go on."""
    sock.settimeout(PATIENCE_S)
    initiator = Initiator(SECRET, hello)
    sock.sendall(initiator.hello)
    while initiator.needed:
        while not select.select([sock], [], [], 0)[0]:
            serve()
        sock.sendall(initiator.receive(sock.recv(initiator.needed, socket.MSG_WAITALL)))
    assert initiator.verdict is Verdict.ACCEPTED
    return sock


def rendezvous(rng: random.Random) -> bool:
    """A rank that says anything, and strangers, change nothing for an honest rank."""
    events: list[Any] = []
    loop = EventLoop()
    server = RendezvousServer(2, SECRET, loop, events.append)
    socks = []

    def serve() -> None:
        loop.turn(time.monotonic() + 0.001)

    try:
        socks += [socket.create_connection(server.address) for _ in range(2)]
        honest = RecordStream(knock(socks[0], serve, Hello(Role.CONTROL, 0, ANY_RANK)))
        rogue = knock(socks[1], serve, Hello(Role.CONTROL, 1, ANY_RANK))
        if rng.random() < 0.5:
            honest.send(RECORDS[0])
        for _ in range(rng.randrange(3)):
            socks.append(socket.create_connection(server.address))
            socks[-1].sendall(changed(rng, Initiator(SECRET, Hello(Role.CONTROL, 1, -1)).hello))
        for piece in cut(rng, stream(rng, [FrameKind.RECORD], RECORDS))[:50]:
            try:
                rogue.sendall(piece)
            except ConnectionError:
                break
            serve()
        honest.send({"record": "doing", "doing": "still here"})
        deadline = time.monotonic() + PATIENCE_S
        while not any(e.kind is EventKind.DOING and e.rank == 0 for e in events):
            assert time.monotonic() < deadline, "the honest rank is not heard any more"
            serve()
    finally:
        server.close()
        loop.close()
        for sock in socks:
            sock.close()
    for event in events:
        assert event.rank in (0, 1, -1)
        if event.failure is not None:
            assert event.failure.rank == 1
            assert_shown(event.failure.headline())
    return not any(event.kind is EventKind.FAILED for event in events)


def listener(rng: random.Random) -> bool:
    """Strangers do not get in, and who holds the secret does."""
    listening = socket.create_server(("127.0.0.1", 0))
    door = Listener(SECRET, Role.DATA, 1, [listening])
    inside, socks = [], []
    try:
        for _ in range(3):
            hello = Initiator(SECRET, Hello(Role.DATA, 5, 1)).hello
            socks.append(socket.create_connection(listening.getsockname()))
            socks[-1].sendall(changed(rng, hello + rng.randbytes(32)))
            inside += door.poll()
        assert not inside
        sock = socket.create_connection(listening.getsockname(), timeout=PATIENCE_S)
        socks.append(sock)
        initiator = Initiator(SECRET, Hello(Role.DATA, 3, 1))
        sock.sendall(initiator.hello)
        while not select.select([sock], [], [], 0)[0]:
            assert door.poll() == []
        sock.sendall(initiator.receive(sock.recv(initiator.needed, socket.MSG_WAITALL)))
        while not inside:
            select.select([door], [], [], 0.1)
            inside = door.poll()
        socks.append(inside[0][0])
        assert inside[0][1] == Hello(Role.DATA, 3, 1)
        return door.strangers == 0
    finally:
        door.close()
        for sock in socks:
            sock.close()


def transport(rng: random.Random) -> bool:
    """A peer that says anything is given up at most; the rank itself goes on."""
    said = rogue_messages(rng, [FrameKind.MESSAGE, FrameKind.SUMMED, *FrameKind])
    return survives("tcp", rng, lambda peer: peer.sendall(said))


def lending(rng: random.Random) -> bool:
    """The same for a peer that lends what is no memory, or messages where none lies."""
    said = rogue_messages(rng, [FrameKind.LENT, FrameKind.LENT, FrameKind.MESSAGE])
    return survives("shm", rng, lambda peer: (lend(rng, peer), peer.sendall(said)))


def survives(name: str, rng: random.Random, misbehave: Callable[[socket.socket], object]) -> bool:
    """Let rank 1, which holds the secret, misbehave; return whether rank 0 got its message."""
    cls = worlds.SOCKETS[name]
    listening = [cls.listen() for _ in range(2)]
    book = {rank: address for rank, (_, address) in enumerate(listening)}
    victim = cls(0, 2, book, listening[0][0], SECRET, limits=LIMITS)
    error: TransportError | None = None
    try:
        with dial(book[0], unix=cls.unix) as peer:
            knock(peer, lambda: time.sleep(0.0005), Hello(Role.DATA, 1, 0))
            work = victim.irecv(1, rng.choice([0, 7]))
            with contextlib.suppress(ConnectionError):  # it has heard enough
                misbehave(peer)
        try:
            work.wait(PATIENCE_S)
        except TransportError as ended:
            error = ended
        assert victim._ended is None, victim._ended
        assert not isinstance(error, (InternalError, TimeoutError)), error
        assert error is None or "rank 1" in str(error)
    finally:
        victim.abort(TransportClosed("over"))
        for sock in listening[1][0]:
            sock.close()
    return error is None


def dial(address: Address, *, unix: bool) -> socket.socket:
    """Connect as the transport would, but wait for it."""
    if not unix:
        return socket.create_connection(address.tcp)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect("\0" + address.unix)
    return sock


def lend(rng: random.Random, peer: socket.socket) -> None:
    """Show an arena, as it should be or as it should not."""
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, rng.choice([0, 1, 4096, 1 << 20, 1 << 20, 1 << 20, 1 << 40]))
    if rng.random() < 0.9:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, rng.choice([7, 7, 7, 6, 1]))  # seal, shrink, grow
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        fair = [(b"\1", [fd])] * 5 + [(b"\0", [])] * 3
        foul = [(b"\1", []), (b"\0", [fd]), (b"x", [fd]), (b"\1", [null]), (b"\1", [fd, null])]
        data, shown = rng.choice(fair + foul)
        socket.send_fds(peer, [data], shown)
    finally:
        os.close(fd)
        os.close(null)


def rogue_messages(rng: random.Random, kinds: Sequence[FrameKind]) -> bytes:
    """Return messages whose length fits their metadata, more often than chance would have it."""
    if rng.random() < 0.3:
        return stream(rng, [int(kind) for kind in FrameKind], [message_meta(rng), None])
    parts = []
    for sequence in range(rng.randrange(1, 4)):
        kind = rng.choice(kinds)
        data = msgpack.packb(message_meta(rng))
        try:
            payload = rng.randbytes(MessageSpec.from_packed(data, zlib.crc32(data)).nbytes)
        except ProtocolError:
            payload = b""
        word = rng.choice([*range(0, 5 * ALIGNMENT, ALIGNMENT), *EDGES])
        whole = frame(
            rng, sequence, kind, data, payload, word=word if kind is FrameKind.LENT else None
        )
        parts.append(whole[: len(whole) - len(payload)] if kind in OFF_STREAM else whole)
    said = b"".join(parts)
    return changed(rng, said) if rng.random() < 0.3 else said
