"""Everything that reads what a network brings, each as a function of a seeded random source.

A target feeds one case and returns whether it was accepted. It raises when something else than
`ProtocolError` or `AuthenticationError` comes out, or when what came out makes no sense.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Final

import msgpack
import transport_worlds as worlds
from mutations import altered, changed, cut, frame, message_meta, packed, stream

from barepp.beats import Beat
from barepp.watch import Watch
from transport.addresses import Address
from transport.connection import _read_meta
from transport.decoder import Decoder, PayloadDone
from transport.errors import (
    AuthenticationError,
    Failure,
    InternalError,
    ProtocolError,
    TransportClosed,
    TransportError,
)
from transport.handshake import ANY_RANK, Acceptor, Hello, Initiator, Role, Verdict
from transport.listener import Listener
from transport.records import RecordStream
from transport.rendezvous import EventKind, RendezvousServer
from transport.tensors import MessageSpec
from transport.wire import Frame, FrameKind, Limits

SECRET: Final = bytes(range(32))
LIMITS: Final = Limits(meta_nbytes=64 * 1024, payload_nbytes=1024 * 1024)
ALLOCATE_NBYTES: Final = 1024 * 1024
PATIENCE_S: Final = 20.0

FAILURE: Final = {"rank": 1, "cause": "exit", "message": "gone", "exit_code": 3, "doing": "2F3"}
BEAT: Final = {
    "made_at": 1.5,
    "doing": "computing 2F3",
    "waits_for": [1],
    "blocked": True,
    "sent": [[1, 3]],
    "received": [[1, 2]],
}
RECORDS: Final = [
    {"record": "join", "world_size": 2, "address": ["host", "unix", "127.0.0.1", 4000]},
    {"record": "beat", "state": BEAT},
    {"record": "beat", "state": None},
    {"record": "barrier"},
    {"record": "failed", "failure": FAILURE},
    {"record": "doing", "doing": "waiting"},
    {"record": "goodbye"},
    {"record": "attached", "rank": 0},
]


# -- without a socket ------------------------------------------------------------------------------


def decode(pieces: list[bytes]) -> tuple[list[Frame | PayloadDone], bool]:
    """Return what a decoder makes of a stream, and whether it found nothing wrong with it."""
    decoder = Decoder(LIMITS, _read_meta)
    events: list[Frame | PayloadDone] = []
    try:
        for piece in pieces:
            rest = piece
            while rest:
                room = decoder.buffer()
                size = min(len(room), len(rest))
                room[:size] = rest[:size]
                decoder.received(size)
                rest = rest[size:]
                while (event := decoder.next_event()) is not None:
                    events.append(event)
                    if isinstance(event, Frame) and decoder._left:
                        decoder.receive_into([memoryview(bytearray(decoder._left))])
    except ProtocolError as error:
        assert str(error)
        return events, False
    return events, True


def decoder(rng: random.Random) -> bool:
    """However a stream is cut, the same frames come out of it, and the same verdict."""
    metas = [message_meta(rng), None, RECORDS[0], [], "x" * 60_000]
    data = stream(rng, [int(kind) for kind in FrameKind], metas)
    whole = decode([data])
    pieces = decode(cut(rng, data))
    assert repr(whole) == repr(pieces), (whole, pieces)  # as text, since nan is not nan
    return whole[1]


def metadata(rng: random.Random) -> bool:
    """A message's metadata is refused, or describes tensors that can be allocated and sent."""
    data = packed(rng, altered(rng, message_meta(rng)))
    announced = rng.choice([0, 4, 100, 2**20, 2**40])
    try:
        spec = MessageSpec.from_packed(data)
        if rng.random() < 0.8:
            announced = spec.nbytes
        spec.fit(announced)
    except ProtocolError as error:
        assert 0 < len(str(error)) < 20_000
        return False
    assert MessageSpec.from_packed(spec.packed.data) == spec
    assert str(spec)
    if spec.nbytes <= ALLOCATE_NBYTES:
        tensors = spec.allocate()
        assert sum(tensor.nbytes for tensor in tensors) == announced
        assert MessageSpec.of(spec.pack(tensors)) == spec
    return True


def handshake(rng: random.Random) -> bool:
    """Whoever gets in has said exactly what a holder of the secret says."""
    claim = Hello(Role.DATA, rng.randrange(-2, 9), 1)
    caller, listener = Initiator(SECRET, claim), Acceptor(SECRET, Role.DATA, 1)
    genuine = True

    def carried(data: bytes) -> bytes:
        nonlocal genuine
        if rng.random() < 0.7:
            return data
        wrong = changed(rng, data) if rng.random() < 0.8 else rng.randbytes(len(data))
        wrong = (wrong + rng.randbytes(len(data)))[: len(data)]  # a side reads what it needs
        genuine = genuine and wrong == data
        return wrong

    try:
        proof = caller.receive(carried(listener.receive(carried(caller.hello))))
        listener.receive(carried(proof))
        assert genuine and listener.accepted == claim
        caller.receive(carried(bytes([rng.choice(list(Verdict))])))
    except AuthenticationError as error:
        assert str(error) and not genuine
        return False
    assert caller.verdict in list(Verdict)
    return genuine


def words(rng: random.Random) -> bool:
    """What is said in records is refused, or can be shown to a person and judged."""
    try:
        match rng.randrange(3):
            case 0:
                failure = Failure.from_record(altered(rng, FAILURE))
                assert Failure.from_record(failure.to_record()) == failure
                assert_shown(failure.headline())
            case 1:
                address = Address.from_record(altered(rng, ["host", "unix", "127.0.0.1", 4000]))
                assert Address.from_record(address.to_record()) == address
            case _:
                return watched(rng)
    except ProtocolError as error:
        assert 0 < len(str(error)) < 20_000
        return False
    return True


def watched(rng: random.Random) -> bool:
    """Let two ranks say anything of themselves, and the launcher judge by it."""
    watch = Watch(range(2), 1e300, 0.5, lambda rank: "")
    accepted = False
    for now in range(6):
        beat = Beat.from_record(msgpack.unpackb(msgpack.packb(altered(rng, BEAT, 0.05))))
        accepted = accepted or beat is not None
        watch.beat(now % 2, beat, float(now))
        hang = watch.check(float(now))
        if hang is not None:
            assert_shown(hang.headline())
    return accepted


def assert_shown(text: str) -> None:
    """No character of it does anything to a terminal but a line's end."""
    assert all(character.isprintable() or character in "\n\t" for character in text), text


# -- with one --------------------------------------------------------------------------------------


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


def knock(address: tuple[str, int], serve: Callable[[], Any], hello: Hello) -> socket.socket:
    """Come in as one who holds the secret; `serve` lets the listener go on."""
    sock = socket.create_connection(address, timeout=PATIENCE_S)
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
    server = RendezvousServer(2, SECRET)
    events: list[Any] = []
    socks = []

    def serve() -> None:
        select.select([server], [], [], 0.001)
        events.extend(server.poll())

    try:
        honest = RecordStream(knock(server.address, serve, Hello(Role.CONTROL, 0, ANY_RANK)))
        rogue = knock(server.address, serve, Hello(Role.CONTROL, 1, ANY_RANK))
        socks += [honest.socket, rogue]
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
    listening = [worlds.TcpTransport.listen() for _ in range(2)]
    book = {rank: address for rank, (_, address) in enumerate(listening)}
    victim = worlds.TcpTransport(0, 2, book, listening[0][0], SECRET, limits=LIMITS)
    error: TransportError | None = None
    try:
        peer = knock(book[0].tcp, lambda: time.sleep(0.0005), Hello(Role.DATA, 1, 0))
        with peer:
            work = victim.irecv(1, rng.choice([0, 7]))
            peer.sendall(rogue_messages(rng))
        try:
            work.wait(PATIENCE_S)
        except TransportError as ended:
            error = ended
        assert victim._ended is None, victim._ended
        assert not isinstance(error, (InternalError, TimeoutError)), error
        assert error is None or "rank 1" in str(error)
    finally:
        victim.abort(TransportClosed("over"))
        listening[1][0][0].close()
    return error is None


def rogue_messages(rng: random.Random) -> bytes:
    """Return messages whose length fits their metadata, more often than chance would have it."""
    if rng.random() < 0.3:
        return stream(rng, [int(kind) for kind in FrameKind], [message_meta(rng), None])
    parts = []
    for sequence in range(rng.randrange(1, 4)):
        kind = rng.choice([FrameKind.MESSAGE, FrameKind.SUMMED, FrameKind.LENT, FrameKind.GOODBYE])
        data = msgpack.packb(message_meta(rng))
        try:
            payload = rng.randbytes(MessageSpec.from_packed(data).nbytes)
        except ProtocolError:
            payload = b""
        parts.append(frame(rng, sequence, kind, data, payload))
    whole = b"".join(parts)
    return changed(rng, whole) if rng.random() < 0.3 else whole


Target = Callable[[random.Random], bool]
TARGETS: Final[dict[str, Target]] = {
    function.__name__: function
    for function in (
        decoder,
        metadata,
        handshake,
        words,
        records,
        listener,
        rendezvous,
        transport,
    )
}
