"""The wire format: a stream of bytes becomes frames and back, with no socket, tensor or clock.

    offset  size  field           meaning (integers are little-endian and unsigned)
    0       4     magic           b"bpp" and the format's version, 1
    4       1     kind            1 message, 2 goodbye, 3 record
    5       3     reserved        zero
    8       4     meta_nbytes     length of the msgpack metadata that follows the header
    12      4     meta_crc        CRC-32 of that metadata
    16      8     payload_nbytes  length of the raw payload that follows the metadata
    24      4     sequence        frames sent before this one on this connection, modulo 2**32
    28      4     header_crc      CRC-32 of the 28 bytes above

The rules that this file guards:

1. A header is believed only after its CRC, and its lengths only within the `Limits`: nothing is
   allocated for a length that was not checked.
2. Frames come in sequence; a lost, doubled or reordered one is an error.
3. After an error the stream is dead: every later call raises the same error.
4. The payload is never copied through a buffer of ours, except for what had already arrived
   together with the header (at most `SCRATCH_NBYTES`).
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Final

import msgpack

from transport.errors import InvalidArgument, ProtocolError

MAGIC: Final = b"bpp\x01"
HEADER: Final = struct.Struct("<4sB3xIIQII")
_SIGNED: Final = struct.Struct("<4sB3xIIQI")  # the part of the header that header_crc covers
SCRATCH_NBYTES: Final = 64 * 1024
MAX_ELEMENTS: Final = 4096  # of one msgpack array or map: each level of nesting allocates as many


class FrameKind(enum.IntEnum):
    """What a frame is for."""

    MESSAGE = 1  # one user message: metadata says tag, dtypes and shapes; the payload follows
    GOODBYE = 2  # the sender will send no more on this connection, and means it
    RECORD = 3  # one record of the control connection: all of it is metadata


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper bounds that a decoder holds the other side to, in bytes."""

    meta_nbytes: int = 64 * 1024
    payload_nbytes: int = 16 * 1024**3


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame whose header and metadata have arrived; its payload is still to come."""

    kind: FrameKind
    meta: Any
    payload_nbytes: int


class PayloadDone(enum.Enum):
    """The event that says: the last frame's payload is complete."""

    DONE = enum.auto()


def encode(
    kind: FrameKind,
    sequence: int,
    meta: object,
    payload_nbytes: int = 0,
    limits: Limits | None = None,
) -> bytes:
    """Return header and metadata of a frame; the payload follows it on the stream as it is.

    Raises:
        InvalidArgument: the frame is over the `limits`; its receiver would refuse it.
    """
    packed: bytes = msgpack.packb(meta)
    if limits is not None:
        for what, nbytes, limit in _lengths(len(packed), payload_nbytes, limits):
            if nbytes > limit:
                raise InvalidArgument(f"{nbytes} bytes of {what} are over the limit of {limit}")
    fields = (MAGIC, kind, len(packed), zlib.crc32(packed), payload_nbytes, sequence & 0xFFFFFFFF)
    signed = _SIGNED.pack(*fields)
    return signed + zlib.crc32(signed).to_bytes(4, "little") + packed


def _lengths(
    meta_nbytes: int, payload_nbytes: int, limits: Limits
) -> tuple[tuple[str, int, int], ...]:
    return (
        ("metadata", meta_nbytes, limits.meta_nbytes),
        ("payload", payload_nbytes, limits.payload_nbytes),
    )


class Decoder:
    """Turns the bytes of one stream into frames. The caller does the reading:

        while (event := decoder.next_event()) is None:
            decoder.received(socket.recv_into(decoder.buffer()))

    `next_event` returns None when it needs more bytes, a `Frame` when metadata is complete, then
    `PayloadDone.DONE`. Between the two the caller names the payload's destination with
    `receive_into`, so that large payloads land where they belong.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._scratch = memoryview(bytearray(SCRATCH_NBYTES))
        self._start = 0  # scratch[start:end] has arrived and is not used yet
        self._end = 0
        self._meta = bytearray()  # metadata that is longer than the scratch buffer gathers here
        self._header: tuple[FrameKind, int, int, int] | None = None
        self._frame: Frame | None = None
        self._destinations: list[memoryview] | None = None  # what is still to be filled
        self._sequence = 0
        self._error: ProtocolError | None = None

    @property
    def mid_frame(self) -> bool:
        """Whether the stream stands inside a frame, so that an end here is a torn one."""
        return self._frame is not None or self._header is not None or self._start != self._end

    def buffer(self) -> memoryview:
        """Return where the next bytes of the stream go; never empty."""
        if self._destinations and self._start == self._end:
            return self._destinations[0]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == SCRATCH_NBYTES:
            # A frame's head stands at the very end: move it to the front to make room behind it.
            rest = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._scratch[self._end :]

    def received(self, nbytes: int) -> None:
        """Say that `nbytes` bytes of the stream were written to the front of `buffer()`."""
        if self._destinations and self._start == self._end:
            self._fill(nbytes)
        else:
            self._end += nbytes

    def feed(self, data: bytes) -> list[Frame | PayloadDone]:
        """Decode `data` with payloads thrown away; for tests, fuzzers and records."""
        events: list[Frame | PayloadDone] = []
        rest = memoryview(data)
        while True:
            while (event := self.next_event()) is not None:
                events.append(event)
                if isinstance(event, Frame) and event.payload_nbytes:
                    self.receive_into([memoryview(bytearray(event.payload_nbytes))])
            if not rest:
                return events
            room = self.buffer()
            nbytes = min(len(room), len(rest))
            room[:nbytes] = rest[:nbytes]
            self.received(nbytes)
            rest = rest[nbytes:]

    def receive_into(self, destinations: Sequence[memoryview]) -> None:
        """Name the memory for the current frame's payload, in order; lengths must add up to it."""
        assert self._frame is not None, "receive_into without a frame"
        assert sum(map(len, destinations)) == self._frame.payload_nbytes, "destinations do not fit"
        self._destinations = [view for view in destinations if len(view)]

    def next_event(self) -> Frame | PayloadDone | None:
        """Return the next event, or None when more bytes are needed.

        Raises:
            ProtocolError: the bytes are not a valid frame; the stream is dead from here on.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._payload_event() if self._frame is not None else self._frame_event()
        except ProtocolError as error:
            self._error = error
            raise

    def _payload_event(self) -> PayloadDone | None:
        assert self._frame is not None
        if self._frame.payload_nbytes:
            assert self._destinations is not None, "the payload has no destination yet"
            while self._destinations and self._start < self._end:  # it came with the header
                view = self._destinations[0]
                nbytes = min(len(view), self._end - self._start)
                view[:nbytes] = self._scratch[self._start : self._start + nbytes]
                self._start += nbytes
                self._fill(nbytes)
            if self._destinations:
                return None
        self._frame = self._destinations = None
        return PayloadDone.DONE

    def _fill(self, nbytes: int) -> None:
        assert self._destinations
        rest = self._destinations[0][nbytes:]
        if len(rest):
            self._destinations[0] = rest
        else:
            self._destinations.pop(0)

    def _frame_event(self) -> Frame | None:
        if self._header is None:
            if self._end - self._start < HEADER.size:
                self._check_magic()
                return None
            self._header = self._decode_header()
        kind, meta_nbytes, meta_crc, payload_nbytes = self._header
        meta = self._take_meta(meta_nbytes)
        if meta is None:
            return None
        if zlib.crc32(meta) != meta_crc:
            raise ProtocolError("the metadata's checksum does not match: bytes changed on the way")
        self._header = None
        self._frame = Frame(kind, unpack(meta), payload_nbytes)
        return self._frame

    def _check_magic(self) -> None:
        head = bytes(self._scratch[self._start : min(self._start + 4, self._end)])
        if not MAGIC.startswith(head):
            raise ProtocolError(f"a frame starts with {MAGIC!r}, these bytes with {head!r}")

    def _decode_header(self) -> tuple[FrameKind, int, int, int]:
        self._check_magic()
        raw = self._scratch[self._start : self._start + HEADER.size]
        self._start += HEADER.size
        _, kind, meta_nbytes, meta_crc, payload_nbytes, sequence, crc = HEADER.unpack(raw)
        if zlib.crc32(raw[: _SIGNED.size]) != crc:
            raise ProtocolError("the header's checksum does not match: bytes changed on the way")
        if sequence != self._sequence & 0xFFFFFFFF:
            raise ProtocolError(
                f"frame number {self._sequence & 0xFFFFFFFF} was due, number {sequence} came"
            )
        self._sequence += 1
        for what, nbytes, limit in _lengths(meta_nbytes, payload_nbytes, self._limits):
            if nbytes > limit:
                raise ProtocolError(
                    f"a frame announces {nbytes} bytes of {what}, over the limit of {limit}"
                )
        try:
            return FrameKind(kind), meta_nbytes, meta_crc, payload_nbytes
        except ValueError:
            raise ProtocolError(f"there is no frame kind {kind}") from None

    def _take_meta(self, meta_nbytes: int) -> bytes | memoryview | None:
        available = self._end - self._start
        if not self._meta and available >= meta_nbytes:  # the usual case: all of it is here
            meta = self._scratch[self._start : self._start + meta_nbytes]
            self._start += meta_nbytes
            return meta
        nbytes = min(available, meta_nbytes - len(self._meta))
        self._meta += self._scratch[self._start : self._start + nbytes]
        self._start += nbytes
        if len(self._meta) < meta_nbytes:
            return None
        whole, self._meta = bytes(self._meta), bytearray()
        return whole


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
