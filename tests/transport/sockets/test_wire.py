"""The frame decoder: however the bytes are cut, and whatever is wrong with them."""

from __future__ import annotations

import random
import re
import struct
import tracemalloc
import zlib

import pytest

from transport.errors import InvalidArgument, ProtocolError
from transport.wire import format as wire
from transport.wire.decoder import SCRATCH_NBYTES, Decoder, PayloadDone
from transport.wire.format import HEADER, MAGIC, OFF_STREAM, Frame, FrameKind, Limits, encode


def header(
    kind: int = 1,
    meta: bytes = b"\xc0",
    payload_nbytes: int = 0,
    sequence: int = 0,
    *,
    tag: int = 0,
    word: int = 0,
    magic: bytes = MAGIC,
    meta_nbytes: int | None = None,
    meta_crc: int | None = None,
) -> bytes:
    """Return a header with a right checksum, whatever its fields say."""
    signed = struct.pack(
        "<4sB3xIIQqQI",
        magic,
        kind,
        len(meta) if meta_nbytes is None else meta_nbytes,
        zlib.crc32(meta) if meta_crc is None else meta_crc,
        payload_nbytes,
        tag,
        word,
        sequence,
    )
    return signed + struct.pack("<I", zlib.crc32(signed))


ON_STREAM = [kind for kind in FrameKind if kind not in OFF_STREAM]


def random_frames(rng: random.Random) -> list[tuple[FrameKind, object, bytes]]:
    metas: list[object] = [
        None,
        [1, False, "float32", [2, 3]],
        {"a": 1, "b": [True, "é"]},
        "x" * 50,
    ]
    metas.append("y" * rng.randrange(60_000))
    sizes = [0, 0, 1, 31, 32, 33, 1000, SCRATCH_NBYTES - 1, SCRATCH_NBYTES + 7, 200_000]
    return [
        (rng.choice(ON_STREAM), rng.choice(metas), rng.randbytes(rng.choice(sizes)))
        for _ in range(rng.randrange(1, 8))
    ]


def stream_of(frames: list[tuple[FrameKind, object, bytes]]) -> bytes:
    return b"".join(
        encode(kind, number, meta, len(payload)) + payload
        for number, (kind, meta, payload) in enumerate(frames)
    )


class Reader:
    """Decodes a stream that arrives in pieces, with each payload spread over several buffers."""

    def __init__(self, rng: random.Random, limits: Limits | None = None) -> None:
        self.decoder = Decoder(limits)
        self.frames: list[tuple[FrameKind, object, bytes]] = []
        self._rng = rng
        self._frame: Frame | None = None
        self._buffers: list[bytearray] = []

    def arrive(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            room = self.decoder.buffer()
            assert len(room) > 0
            nbytes = min(len(room), len(rest))
            room[:nbytes] = rest[:nbytes]
            self.decoder.received(nbytes)
            rest = rest[nbytes:]
            while (event := self.decoder.next_event()) is not None:
                self._take(event)

    def _take(self, event: Frame | PayloadDone) -> None:
        if isinstance(event, Frame):
            left = event.payload_nbytes
            self._frame, self._buffers = event, []
            while left:
                size = self._rng.randrange(left + 1)  # empty buffers too
                self._buffers.append(bytearray(size))
                left -= size
            if self._buffers:
                self.decoder.receive_into([memoryview(buffer) for buffer in self._buffers])
        else:
            assert self._frame is not None
            payload = b"".join(self._buffers)
            self.frames.append((self._frame.kind, self._frame.meta, payload))
            self._frame = None


@pytest.mark.parametrize("seed", range(15))
def test_frames_come_out_the_same_however_the_stream_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    frames = random_frames(rng)
    stream = stream_of(frames)
    for largest in (len(stream), 100_000, 5000, 40):
        reader = Reader(rng)
        at = 0
        while at < len(stream):
            size = rng.randrange(1, largest + 1) if largest < len(stream) else largest
            reader.arrive(stream[at : at + size])
            at += size
        assert reader.frames == frames
        assert not reader.decoder.mid_frame


def test_byte_by_byte_and_mid_frame_is_true_exactly_inside_a_frame() -> None:
    frames = [
        (FrameKind.MESSAGE, [1, False], b"abc"),
        (FrameKind.GOODBYE, None, b""),
        (FrameKind.RECORD, {"k": "v" * 40}, b""),
    ]
    ends = set()
    at = 0
    for number, (kind, meta, payload) in enumerate(frames):
        at += len(encode(kind, number, meta, len(payload))) + len(payload)
        ends.add(at)
    reader = Reader(random.Random(0))
    for position, byte in enumerate(stream_of(frames), start=1):
        reader.arrive(bytes([byte]))
        assert reader.decoder.mid_frame == (position not in ends), position
    assert reader.frames == frames


def test_metadata_longer_than_the_scratch_buffer() -> None:
    limits = Limits(meta_nbytes=1 << 20)
    frames: list[tuple[FrameKind, object, bytes]] = [
        (FrameKind.RECORD, "z" * nbytes, b"!" * 5)
        for nbytes in (SCRATCH_NBYTES - 40, SCRATCH_NBYTES, 300_000, 3)
    ]
    for size in (1 << 20, 70_000, 777):
        reader = Reader(random.Random(1), limits)
        stream = stream_of(frames)
        for at in range(0, len(stream), size):
            reader.arrive(stream[at : at + size])
        assert reader.frames == frames


def test_bytes_after_a_frame_belong_to_the_next_one() -> None:
    first, second = encode(FrameKind.RECORD, 0, "one"), encode(FrameKind.RECORD, 1, "two")
    decoder = Decoder()
    events = decoder.feed(first + second[:10])
    assert [e.meta for e in events if isinstance(e, Frame)] == ["one"]
    assert decoder.mid_frame
    events = decoder.feed(second[10:])
    assert [e.meta for e in events if isinstance(e, Frame)] == ["two"]


@pytest.mark.parametrize("kind", OFF_STREAM)
def test_the_payload_of_a_lent_or_apart_message_is_not_on_the_stream(kind: FrameKind) -> None:
    elsewhere = encode(kind, 0, [1], 2**30, tag=-7, word=2**63 + 1)
    events = Decoder().feed(elsewhere + encode(FrameKind.RECORD, 1, "next"))
    assert events == [
        Frame(kind, [1], 2**30, -7, 2**63 + 1),
        PayloadDone.DONE,
        Frame(FrameKind.RECORD, "next", 0),
        PayloadDone.DONE,
    ]


def test_table_of_the_docstring_is_the_struct() -> None:
    rows = re.findall(r"^    (\d+) +(\d+) +(\w+) ", wire.__doc__ or "", re.MULTILINE)
    names = [name for _, _, name in rows]
    assert names == [
        "magic", "kind", "reserved", "meta_nbytes", "meta_crc", "payload_nbytes", "tag", "word",
        "sequence", "header_crc",
    ]  # fmt: skip
    values = {
        "magic": MAGIC,
        "kind": 3,
        "reserved": 0,
        "meta_nbytes": 0x01020304,
        "meta_crc": 0x05060708,
        "payload_nbytes": 0x1112131415161718,
        "tag": 0x4142434445464748,
        "word": 0x5152535455565758,
        "sequence": 0x21222324,
        "header_crc": 0x31323334,
    }
    packed = HEADER.pack(*(values[name] for name in names if name != "reserved"))
    end = 0
    for offset, size, name in rows:
        assert int(offset) == end
        end += int(size)
        field, value = packed[int(offset) : end], values[name]
        expected = value if isinstance(value, bytes) else value.to_bytes(int(size), "little")
        assert field == expected, name
    assert end == HEADER.size == len(packed)


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"GET / HTTP/1.1\r\n", "starts with"),
        (b"b", None),
        (b"bx", "starts with"),
        (header(magic=b"bpp\x01") + b"\xc0", "starts with"),
        (header(kind=0) + b"\xc0", "kind 0"),
        (header(kind=9) + b"\xc0", "kind 9"),
        (header(sequence=1) + b"\xc0", "number 0 was due, number 1"),
        (header(meta_crc=0) + b"\xc0", "checksum"),
        (header(meta_nbytes=65_537) + b"\xc0", "65537 bytes of metadata"),
        (header(meta_nbytes=2**32 - 1) + b"\xc0", "4294967295 bytes of metadata"),
        (header(payload_nbytes=2**40) + b"\xc0", "1099511627776 bytes of payload"),
        (header(payload_nbytes=2**64 - 1) + b"\xc0", "18446744073709551615 bytes of payload"),
        (header(meta=b"") + b"", "msgpack"),
        (header(meta=b"\xc1") + b"\xc1", "msgpack"),
        (header(meta=b"\xc0\xc0") + b"\xc0\xc0", "msgpack"),
        (header(meta=b"\xd4\x05a") + b"\xd4\x05a", "extension type 5"),
        (header(meta=b"\x81\xc0\xc0") + b"\x81\xc0\xc0", "msgpack"),
        (header(meta=b"\xa1\xff") + b"\xa1\xff", "msgpack"),
        (header(meta=b"\x91" * 60_000) + b"\x91" * 60_000, "msgpack"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_the_stream_stays_dead(stream: bytes, says: str | None) -> None:
    for size in (len(stream), 1, 7):
        decoder = Decoder()
        if says is None:
            assert decoder.feed(stream) == []
            continue
        with pytest.raises(ProtocolError, match=says) as first:
            for at in range(0, len(stream), size):
                decoder.feed(stream[at : at + size])
        for later in (b"", encode(FrameKind.MESSAGE, 0, None), encode(FrameKind.MESSAGE, 1, None)):
            with pytest.raises(ProtocolError) as again:
                decoder.feed(later)
            assert again.value is first.value


def test_every_single_flipped_bit_of_head_and_metadata_is_noticed() -> None:
    whole = encode(FrameKind.MESSAGE, 0, [7, False, "float32", [2]], 8)
    for bit in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            Decoder().feed(bytes(broken) + b"12345678")


def test_lost_doubled_and_swapped_frames_are_noticed() -> None:
    frames = [encode(FrameKind.RECORD, number, number) for number in range(4)]
    for order in ([0, 2], [0, 0], [1], [0, 1, 3], [0, 1, 2, 1]):
        with pytest.raises(ProtocolError, match="was due"):
            Decoder().feed(b"".join(frames[i] for i in order))


def test_sequence_wraps() -> None:
    decoder = Decoder()
    decoder._sequence = 2**32 - 1
    stream = encode(FrameKind.RECORD, 2**32 - 1, "a") + encode(FrameKind.RECORD, 2**32, "b")
    assert [e.meta for e in decoder.feed(stream) if isinstance(e, Frame)] == ["a", "b"]


def test_a_frame_of_many_gigabytes_costs_nothing() -> None:
    tracemalloc.start()
    try:
        refused = Decoder()
        with pytest.raises(ProtocolError):
            refused.feed(header(payload_nbytes=2**40) + b"\xc0")
        decoder = Decoder(Limits(payload_nbytes=2**50))
        head = encode(FrameKind.MESSAGE, 0, [1], 5 * 2**30 + 3)
        room = decoder.buffer()
        room[: len(head)] = head
        decoder.received(len(head))
        assert decoder.next_event() == Frame(FrameKind.MESSAGE, [1], 5 * 2**30 + 3)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_nested_arrays_that_announce_much_cost_little() -> None:
    hostile = b"\xdd\x00\x00\xff\x00" * 1000  # each level claims 65280 elements
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            wire.unpack(hostile + b"\xc0" * (65_000 - len(hostile)))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_sender_is_held_to_the_same_limits() -> None:
    limits = Limits(meta_nbytes=10, payload_nbytes=100)
    assert encode(FrameKind.MESSAGE, 0, "x" * 9, 100, limits)
    with pytest.raises(InvalidArgument, match="11 bytes of metadata"):
        encode(FrameKind.MESSAGE, 0, "x" * 10, 0, limits)
    with pytest.raises(InvalidArgument, match="101 bytes of payload"):
        encode(FrameKind.MESSAGE, 0, None, 101, limits)
