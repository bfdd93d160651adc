"""What a bad network does to the bytes of one direction of a connection, stated as data.

A trouble applies to the bytes that rank `src` sends to rank `dst` (None for any; `RENDEZVOUS` is
the other end of a control connection), whoever of the two has called. Two kinds exist:

    Pace     every byte arrives, in order: cut into small writes, each one late by a random time
    Fault    once, at a `Spot` of the stream: a flipped bit, a reset, an end, or silence

Nothing here does input or output; `proxy.py` carries it out.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from transport.sockets.handshake import ANY_RANK, HELLO, NONCE_NBYTES, PROOF_NBYTES
from transport.wire.format import HEADER, OFF_STREAM

RENDEZVOUS: Final = ANY_RANK
CALLER_NBYTES: Final = HELLO.size + PROOF_NBYTES  # of the handshake, from the side that calls
CALLEE_NBYTES: Final = NONCE_NBYTES + PROOF_NBYTES + 1


class Part(enum.Enum):
    """Which part of the stream a byte belongs to."""

    HANDSHAKE = enum.auto()
    HEADER = enum.auto()
    META = enum.auto()
    PAYLOAD = enum.auto()


class Spot(NamedTuple):
    """One byte of the stream: which part, how far into it, and of which frame."""

    part: Part
    offset: int = 0
    frame: int = 0


class Act(enum.Enum):
    """What happens at a spot."""

    FLIP = enum.auto()  # one bit of this byte arrives changed
    RESET = enum.auto()  # this byte and all after it are lost; both ends are told so by a reset
    FINISH = enum.auto()  # this byte and all after it are lost, as if the sender had ended here
    STALL = enum.auto()  # this byte and all after it wait until the network is released


@dataclasses.dataclass(frozen=True)
class Fault:
    """Do `act` at `spot`, on as many connections as `times` says."""

    act: Act
    spot: Spot
    src: int | None = None
    dst: int | None = None
    bit: int = 0
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Pace:
    """Cut the stream into writes of at most `largest` bytes, each late by up to `delay_s`.

    Most delays are short and a few are long: the mean is a fifth of `delay_s`. Bytes never pass
    one another on one connection; on two, they do.
    """

    seed: int
    largest: int = 65536
    delay_s: float = 0.0
    src: int | None = None
    dst: int | None = None

    def delay(self, rng: random.Random) -> float:
        """Return how late one write is."""
        return self.delay_s * rng.random() ** 4 if self.delay_s else 0.0


Trouble = Fault | Pace


def applies(trouble: Trouble, src: int, dst: int) -> bool:
    """Whether a trouble is meant for what `src` sends to `dst`."""
    return trouble.src in (None, src) and trouble.dst in (None, dst)


class Layout:
    """Follows one direction of a stream: in which part of which frame the next byte stands."""

    def __init__(self, handshake_nbytes: int) -> None:
        self.frame = 0
        self._part = Part.HANDSHAKE
        self._offset = 0
        self._left = handshake_nbytes
        self._header = b""
        self._lengths: list[tuple[Part, int]] = []  # the parts of this frame still to come

    def runs(self, data: bytes) -> Iterator[tuple[Spot, bytes]]:
        """Cut `data` where one part ends and the next begins; a spot is that of the first byte."""
        while data:
            run, data = data[: self._left], data[self._left :]
            yield Spot(self._part, self._offset, self.frame), run
            if self._part is Part.HEADER:
                self._header += run
            self._offset += len(run)
            self._left -= len(run)
            if not self._left:
                self._next_part()

    def _next_part(self) -> None:
        if self._part is Part.HEADER:
            _, kind, meta_nbytes, _, payload_nbytes, *_ = HEADER.unpack(self._header)
            if kind in OFF_STREAM:  # its payload does not travel here
                payload_nbytes = 0
            parts = [(Part.META, meta_nbytes), (Part.PAYLOAD, payload_nbytes)]
            self._lengths = [(part, nbytes) for part, nbytes in parts if nbytes]
            self._header = b""
        if not self._lengths:
            self.frame += self._part is not Part.HANDSHAKE
            self._lengths = [(Part.HEADER, HEADER.size)]
        self._part, self._left = self._lengths.pop(0)
        self._offset = 0


def strike(faults: Sequence[Fault], spot: Spot, run: bytes) -> tuple[Fault, int] | None:
    """Return the first fault whose spot lies within the run that begins at `spot`, and where."""
    found = [
        (fault.spot.offset - spot.offset, number)
        for number, fault in enumerate(faults)
        if (fault.spot.part, fault.spot.frame) == (spot.part, spot.frame)
        and 0 <= fault.spot.offset - spot.offset < len(run)
    ]
    if not found:
        return None
    at, number = min(found)
    return faults[number], at
