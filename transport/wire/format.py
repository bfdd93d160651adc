"""What a frame looks like in bytes; no socket, tensor or clock.

    offset  size  field           meaning (integers are little-endian; all but tag unsigned)
    0       4     magic           b"bpp" and the format's version, 2
    4       1     kind            1 message, 2 goodbye, 3 record; 4 summed message (with a
    checksum),
                                    5 lent message (payload in shared memory), 6 apart message
                                    (payload beside the stream)
    5       3     reserved        zero
    8       4     meta_nbytes     length of the msgpack metadata that follows the header
    12      4     meta_crc        CRC-32 of that metadata
    16      8     payload_nbytes  length of the payload
    24      8     tag             of a message: its tag
    32      8     word            summed, apart: the sum of the payload; lent: where it lies
    40      4     sequence        frames sent before this one on this connection, modulo 2**32
    44      4     header_crc      CRC-32 of the 44 bytes above

1. The payload follows the metadata. There are two exceptions: the payload of a lent message lies in
   memory that both sides map (shm/transport.py); that of an apart message travels beside the
   stream, in the order of the frames (torch_dist/off_stream.py).
2. What differs between messages of one shape stands in the header. So their metadata is the same
   bytes again and again, and is packed and read once.
3. Metadata is msgpack, and nothing in it is ever evaluated.

decoder.py reads a stream of these frames.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import msgpack

from transport.errors import InvalidArgument, ProtocolError

MAGIC: Final = b"bpp\x02"
HEADER: Final = struct.Struct("<4sB3xIIQqQII")
SIGNED: Final = struct.Struct("<4sB3xIIQqQI")  # the part of the header that header_crc covers
_UNSIGNED: Final = struct.Struct("<I")
MAX_ELEMENTS: Final = 4096  # of one msgpack array or map: each level of nesting allocates as many


class FrameKind(enum.IntEnum):
    """What a frame is for."""

    MESSAGE = 1  # one user message: metadata says dtypes and shapes; the payload follows
    GOODBYE = 2  # the sender will send no more on this connection, and means it
    RECORD = 3  # one record of the control connection: all of it is metadata
    SUMMED = 4  # a message whose payload has a sum to be held against
    LENT = 5  # a message whose payload lies in memory that the sender lends
    APART = 6  # a message whose payload travels beside the stream


OFF_STREAM: Final = frozenset({FrameKind.LENT, FrameKind.APART})
MESSAGES: Final = frozenset({FrameKind.MESSAGE, FrameKind.SUMMED}) | OFF_STREAM
KINDS: Final = {int(kind): kind for kind in FrameKind}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper bounds that a decoder holds the other side to, in bytes."""

    meta_nbytes: int = 64 * 1024
    payload_nbytes: int = 16 * 1024**3


class Frame(NamedTuple):
    """A frame whose header and metadata have arrived; its payload is still to come."""

    kind: FrameKind
    meta: Any
    payload_nbytes: int
    tag: int = 0
    word: int = 0


# Called once a message: half the time of `Frame(...)`, which sorts out names and defaults.
make_frame: Final[Callable[[tuple[Any, ...]], Frame]] = functools.partial(tuple.__new__, Frame)


class Packed(NamedTuple):
    """Metadata as it travels, and its CRC-32: worth keeping when it is sent again and again."""

    data: bytes
    crc: int


def pack(meta: object) -> Packed:
    """Return `meta` as msgpack."""
    data: bytes = msgpack.packb(meta)
    return Packed(data, zlib.crc32(data))


def encode(
    kind: FrameKind,
    sequence: int,
    meta: object,
    payload_nbytes: int = 0,
    limits: Limits | None = None,
    *,
    tag: int = 0,
    word: int = 0,
    payload: Iterable[memoryview] = (),
) -> bytes:
    """Return header and metadata of a frame; its payload follows, unless `payload` joins it here.

    Raises:
        InvalidArgument: the frame is over the `limits`; its receiver would refuse it.
    """
    data, crc = meta if type(meta) is Packed else pack(meta)
    if limits is not None and (
        len(data) > limits.meta_nbytes or payload_nbytes > limits.payload_nbytes
    ):
        raise InvalidArgument(over_the_limit(len(data), payload_nbytes, limits))
    signed = SIGNED.pack(
        MAGIC, kind, len(data), crc, payload_nbytes, tag, word, sequence & 0xFFFFFFFF
    )
    return b"".join((signed, _UNSIGNED.pack(zlib.crc32(signed)), data, *payload))


def check_crc(data: bytes, crc: int) -> None:
    """Raise ProtocolError when metadata is not what its sender had checked."""
    if zlib.crc32(data) != crc:
        raise ProtocolError("the metadata's checksum does not match: bytes changed on the way")


def over_the_limit(meta_nbytes: int, payload_nbytes: int, limits: Limits) -> str:
    """Return what is too long about a frame that is."""
    if meta_nbytes > limits.meta_nbytes:
        return f"{meta_nbytes} bytes of metadata are over the limit of {limits.meta_nbytes}"
    return f"{payload_nbytes} bytes of payload are over the limit of {limits.payload_nbytes}"


def unpack(meta: bytes | memoryview) -> Any:
    """Decode msgpack metadata; nothing in it is ever evaluated.

    Raises:
        ProtocolError: the bytes are not exactly one msgpack value.
    """
    try:
        return msgpack.unpackb(
            meta,
            ext_hook=_refuse_extension,
            max_array_len=MAX_ELEMENTS,
            max_map_len=MAX_ELEMENTS,
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolError(f"the metadata is not valid msgpack: {error}") from error


def _refuse_extension(code: int, data: bytes) -> None:
    raise ProtocolError(f"msgpack extension type {code} ({len(data)} bytes) has no use here")
