"""What a network could bring instead of what was sent: a corpus, and seeded changes to it.

Everything is made from a `random.Random` alone, so a case is found again by its seed.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgpack

from transport.message.tensors import DTYPES
from transport.wire.format import MAGIC, SIGNED

EDGES: Final = [0, 1, -1, 2, 127, 128, 255, 256, 4096, 65535, 65536, 2**31, 2**32 - 1, 2**32]
EDGES += [2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63)]
LETTERS: Final = ["", "a", "rank", "é", "\x1b[2J", "\x00", "\n" * 3, "\u202e", "\ud7ff", "x" * 300]

# Metadata that is small as bytes and as large as it gets as objects.
HOSTILE: Final = [
    b"\x91" * 600,
    b"\xdc\x0f\xff" * 200,
    (b"\xdd\x00\x00\xff\x00" * 1100).ljust(65_400, b"\xc0"),  # each claims 65280 elements
    b"\xde\x0f\xff" * 200,
    b"\xdf\x00\xff\xff\xff" * 200,
    b"\xdc\x10\x00" + b"\x90" * 4096,
    b"\xdc\x00\x10" + (b"\xdc\x0f\xff" + b"\x80" * 4095) * 16,
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\x7f\xff\xff\xff",
    b"\xc9\x7f\xff\xff\xff\x01",
    b"\xc1",
    b"",
]


def anything(rng: random.Random, depth: int = 3) -> Any:
    """Return a random value that msgpack can carry."""
    count = rng.randrange(5)
    makers: list[Callable[[], Any]] = [
        lambda: rng.choice([None, True, False]),
        lambda: rng.choice(EDGES),
        lambda: rng.choice([0.5, -0.0, float("inf"), float("nan"), 1e308]),
        lambda: rng.choice([*LETTERS, *DTYPES]),
        lambda: rng.randbytes(rng.choice([0, 1, 40])),
        lambda: [anything(rng, depth - 1) for _ in range(count)],
        lambda: {rng.choice([*LETTERS, "rank"]): anything(rng, depth - 1) for _ in range(count)},
    ]
    return rng.choice(makers if depth else makers[:-2])()


def altered(rng: random.Random, value: Any, chance: float = 0.15) -> Any:
    """Return a copy of `value` in which some parts are something else, missing or doubled."""
    if rng.random() < chance:
        return anything(rng)
    if isinstance(value, dict):
        kept = {key: altered(rng, item, chance) for key, item in value.items()}
        if kept and rng.random() < chance:
            del kept[rng.choice(list(kept))]
        return kept
    if isinstance(value, (list, tuple)):
        items = [altered(rng, item, chance) for item in value]
        if items and rng.random() < chance:
            items.insert(rng.randrange(len(items)), rng.choice(items))
        if items and rng.random() < chance:
            del items[rng.randrange(len(items))]
        return items
    return value


def message_meta(rng: random.Random) -> list[Any]:
    """Return the metadata of a message that could have been sent, or almost."""
    count = rng.choice([1, 1, 1, 0, 2, 5])
    meta: list[Any] = [count != 1 or rng.random() < 0.3]
    for _ in range(count):
        dims = rng.choice([0, 1, 2, 3, 64, 65])
        shape = [rng.randrange(6 if dims <= 3 else 2) for _ in range(dims)]
        if rng.random() < 0.1:  # huge, and yet without an element
            shape = [0, *rng.choices([1, 2**31, 2**40, 2**62], k=2)]
        meta += [rng.choice(list(DTYPES)), shape]
    return meta


def packed(rng: random.Random, meta: Any) -> bytes:
    """Return `meta` as msgpack, sometimes with its bytes changed or something hostile instead."""
    data: bytes = msgpack.packb(meta)
    match rng.randrange(16):
        case 0:
            return rng.choice(HOSTILE)
        case 1 | 2:
            return changed(rng, data)
        case _:
            return data


def frame(
    rng: random.Random,
    sequence: int,
    kind: int,
    meta: bytes,
    payload: bytes,
    *,
    word: int | None = None,
) -> bytes:
    """Return a frame with right checksums, though a field may say anything."""
    tag = rng.choice([0, 7, rng.choice(EDGES)])
    if word is None:
        word = rng.choice([0, sum_of_one(payload)])
    fields = [kind, len(meta), zlib.crc32(meta), len(payload), tag, word, sequence]
    if rng.random() < 0.1:
        at = rng.randrange(len(fields))
        fields[at] = rng.choice(EDGES)
    sizes = [8, 32, 32, 64, 63, 64, 32]
    fields = [abs(value) % 2**size for value, size in zip(fields, sizes, strict=True)]
    signed = SIGNED.pack(MAGIC, *fields)
    return signed + struct.pack("<I", zlib.crc32(signed)) + meta + payload


def sum_of_one(payload: bytes) -> int:
    """Return the sum that a payload of a single tensor has; written down here once more."""
    words = [payload[at : at + 8] for at in range(0, len(payload), 8)]
    return sum(int.from_bytes(word, "little") for word in words) % 2**64


def changed(rng: random.Random, data: bytes) -> bytes:
    """Return `data` after one to three accidents."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at:]
            case 3:
                out[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 4:
                del out[at : at + rng.randrange(1, 20)]
            case _:
                out[at : at + 8] = struct.pack("<q", rng.choice(EDGES[:-4]) % 2**63)
    return bytes(out)


def stream(rng: random.Random, kinds: Sequence[int], metas: Sequence[Any]) -> bytes:
    """Return a few frames of these kinds and metadata, in sequence as a rule; then accidents."""
    frames = []
    for sequence in range(rng.randrange(1, 5)):
        kind = rng.choice(kinds) if rng.random() < 0.95 else rng.randrange(256)
        meta = rng.choice(metas)
        meta = packed(rng, altered(rng, meta) if rng.random() < 0.4 else meta)
        payload = rng.randbytes(rng.choice([0, 0, 1, 8, 16, 100, 5000]))
        frames.append(frame(rng, sequence, kind, meta, payload))
    if rng.random() < 0.1:
        rng.shuffle(frames)
    whole = b"".join(frames)
    return changed(rng, whole) if rng.random() < 0.3 else whole


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    """Return `data` in pieces of a random size."""
    largest = rng.choice([1, 7, 100, len(data) + 1]) if len(data) < 3000 else len(data)
    pieces = []
    while data:
        size = rng.randint(1, largest)
        pieces.append(data[:size])
        data = data[size:]
    return pieces
