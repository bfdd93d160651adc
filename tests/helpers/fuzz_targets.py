"""What reads bytes without a socket, each part as a function of a seeded random source.

A target feeds one case and returns whether it was accepted. It raises when something else than
`ProtocolError` or `AuthenticationError` comes out, or when what came out makes no sense.
"""

from __future__ import annotations

import random
import zlib
from typing import Final

import msgpack
from mutations import altered, changed, cut, message_meta, packed, stream

from barepp.launch.hang_detector import HangDetector
from barepp.worker.heartbeat import Heartbeat
from transport.errors import AuthenticationError, Failure, ProtocolError
from transport.message.specs import MessageSpec
from transport.sockets.addresses import Address
from transport.sockets.connection import _read_meta
from transport.sockets.handshake import Acceptor, Hello, Initiator, Role, Verdict
from transport.wire.decoder import Decoder, PayloadDone
from transport.wire.format import Frame, FrameKind, Limits

SECRET: Final = bytes(range(32))
LIMITS: Final = Limits(meta_nbytes=64 * 1024, payload_nbytes=1024 * 1024)
ALLOCATE_NBYTES: Final = 1024 * 1024

FAILURE: Final = {"rank": 1, "cause": "exit", "message": "gone", "exit_code": 3, "doing": "2F3"}
BEAT: Final = {
    "made_at": 1.5,
    "doing": "computing 2F3",
    "waits_for": [1],
    "blocked": True,
    "sent": [[1, 3]],
    "received": [[1, 2]],
    "totals": [4096, 2048, 3, 24.5],
}
RECORDS: Final = [
    {"record": "join", "world_size": 2, "address": ["host", "unix", "127.0.0.1", 4000, 1]},
    {"record": "beat", "state": BEAT},
    {"record": "beat", "state": None},
    {"record": "barrier"},
    {"record": "failed", "failure": FAILURE},
    {"record": "doing", "doing": "waiting"},
    {"record": "goodbye"},
    {"record": "attached", "rank": 0},
]


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
        spec = MessageSpec.from_packed(data, zlib.crc32(data))
        if rng.random() < 0.8:
            announced = spec.nbytes
        spec.fit(announced)
    except ProtocolError as error:
        assert 0 < len(str(error)) < 20_000
        return False
    assert MessageSpec.from_packed(*spec.packed) == spec
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
                address = Address.from_record(altered(rng, ["host", "unix", "127.0.0.1", 4000, 1]))
                assert Address.from_record(address.to_record()) == address
            case _:
                return watched(rng)
    except ProtocolError as error:
        assert 0 < len(str(error)) < 20_000
        return False
    return True


def watched(rng: random.Random) -> bool:
    """Let two ranks say anything of themselves, and the launcher judge by it."""
    watch = HangDetector(range(2), 1e300, 0.5, lambda rank: "")
    accepted = False
    for now in range(6):
        beat = Heartbeat.from_record(msgpack.unpackb(msgpack.packb(altered(rng, BEAT, 0.05))))
        accepted = accepted or beat is not None
        watch.beat(now % 2, beat, float(now))
        hang = watch.check(float(now))
        if hang is not None:
            assert_shown(hang.headline())
    return accepted


def assert_shown(text: str) -> None:
    """No character of it does anything to a terminal but a line's end."""
    assert all(character.isprintable() or character in "\n\t" for character in text), text
