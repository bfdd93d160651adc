"""Bytes in, frames out: reads one stream, however its bytes are cut.

The rules that this file guards:

1. A header is believed only after its CRC, and its lengths only within the `Limits`: nothing is
   allocated for a length that was not checked.
2. Frames come in sequence; a lost, doubled or reordered one is an error.
3. After an error the stream is dead: every later call raises the same error.
4. The payload is never copied through a buffer of ours, except for what had already arrived
   together with the header (at most `SCRATCH_NBYTES`).

It does no input itself, so it is tested without a socket and shared by whoever has a stream.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from transport.errors import ProtocolError
from transport.wire.format import (
    HEADER,
    KINDS,
    MAGIC,
    OFF_STREAM,
    SIGNED,
    Frame,
    FrameKind,
    Limits,
    check_crc,
    make_frame,
    over_the_limit,
    unpack,
)

SCRATCH_NBYTES: Final = (64 + 4) * 1024  # so that a message of 64 KiB comes at one read


class PayloadDone(enum.Enum):
    """The event that says: the last frame's payload is complete."""

    DONE = enum.auto()


class Decoder:
    """Turns the bytes of one stream into frames. The caller does the reading:

        while (event := decoder.next_event()) is None:
            decoder.received(socket.recv_into(decoder.buffer()))

    `next_event` returns None when it needs more bytes, a `Frame` when metadata is complete, then
    `PayloadDone.DONE`. Between the two the caller names the payload's destination with
    `receive_into`, so that large payloads land where they belong. `read_meta` is given a frame's
    kind, its metadata and their CRC-32; it checks that, and returns what `Frame.meta` is to hold.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        read_meta: Callable[[FrameKind, bytes, int], Any] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._read_meta = read_meta or _unpacked
        self._scratch = memoryview(bytearray(SCRATCH_NBYTES))
        self._start = 0  # scratch[start:end] has arrived and is not used yet
        self._end = 0
        self._meta = bytearray()  # metadata that is longer than the scratch buffer gathers here
        self._header: tuple[FrameKind, int, int, int, int, int] | None = None
        self._frame: Frame | None = None
        self._left = 0  # bytes of the frame's payload that are still to come on the stream
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
                if isinstance(event, Frame) and self._left:
                    self.receive_into([memoryview(bytearray(self._left))])
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
        assert sum(map(len, destinations)) == self._left, "destinations do not fit"
        self._destinations = [view for view in destinations if len(view)]

    def take_payload(self) -> memoryview | None:
        """Return the current frame's payload if all of it came with the header, and go on.

        Otherwise None: name its destination. The view is good until bytes are received again.
        """
        start, end = self._start, self._start + self._left
        if end > self._end:
            return None
        self._start = end
        self._frame = None
        return self._scratch[start:end]

    def next_event(self) -> Frame | PayloadDone | None:
        """Return the next event, or None when more bytes are needed.

        Raises:
            ProtocolError: the bytes are not a valid frame; the stream is dead from here on.
        """
        if self._error is not None:
            raise self._error
        try:
            if self._frame is not None:
                return self._payload_event()
            return self._frame_event() if self._start != self._end else None
        except ProtocolError as error:
            self._error = error
            raise

    def _payload_event(self) -> PayloadDone | None:
        if self._left:
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
        view = self._destinations[0]
        if nbytes < len(view):
            self._destinations[0] = view[nbytes:]
        else:
            del self._destinations[0]

    def _frame_event(self) -> Frame | None:
        header = self._header or self._decode_header()
        if header is None:
            return None
        kind, meta_nbytes, meta_crc, payload_nbytes, tag, word = header
        start, stop = self._start, self._start + meta_nbytes
        if stop <= self._end and not self._meta:  # the usual case: it is all here
            meta = bytes(self._scratch[start:stop])
            self._start = stop
        else:
            self._header = header
            self._gather_meta(meta_nbytes)
            if len(self._meta) < meta_nbytes:
                return None
            meta, self._meta = bytes(self._meta), bytearray()
        self._header = None
        value = self._read_meta(kind, meta, meta_crc)
        frame = self._frame = make_frame((kind, value, payload_nbytes, tag, word))
        self._left = 0 if kind in OFF_STREAM else payload_nbytes
        return frame

    def _check_magic(self) -> None:
        head = bytes(self._scratch[self._start : min(self._start + 4, self._end)])
        if not MAGIC.startswith(head):
            raise ProtocolError(f"a frame starts with {MAGIC!r}, these bytes with {head!r}")

    def _decode_header(self) -> tuple[FrameKind, int, int, int, int, int] | None:
        """Return what the next header says, None when it has not all come."""
        start = self._start
        if self._end - start < HEADER.size:
            self._check_magic()
            return None
        magic, number, meta_nbytes, meta_crc, payload_nbytes, tag, word, sequence, crc = (
            HEADER.unpack_from(self._scratch, start)
        )
        if magic != MAGIC:
            self._check_magic()
        self._start = start + HEADER.size
        if zlib.crc32(self._scratch[start : start + SIGNED.size]) != crc:
            raise ProtocolError("the header's checksum does not match: bytes changed on the way")
        due = self._sequence & 0xFFFFFFFF
        if sequence != due:
            raise ProtocolError(f"frame number {due} was due, number {sequence} came")
        self._sequence += 1
        limits = self._limits
        if meta_nbytes > limits.meta_nbytes or payload_nbytes > limits.payload_nbytes:
            over = over_the_limit(meta_nbytes, payload_nbytes, limits)
            raise ProtocolError(f"a frame is too long: {over}")
        kind = KINDS.get(number)
        if kind is None:
            raise ProtocolError(f"there is no frame kind {number}")
        return kind, meta_nbytes, meta_crc, payload_nbytes, tag, word

    def _gather_meta(self, meta_nbytes: int) -> None:
        nbytes = min(self._end - self._start, meta_nbytes - len(self._meta))
        self._meta += self._scratch[self._start : self._start + nbytes]
        self._start += nbytes


def _unpacked(kind: FrameKind, meta: bytes, crc: int) -> Any:
    check_crc(meta, crc)
    return unpack(meta)
