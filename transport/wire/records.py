"""Records over one non-blocking socket: what a control connection carries, in both directions.

A record is a msgpack map with a name under "record", in a frame of its own (see wire/format.py).
"""

from __future__ import annotations

import contextlib
import select
import socket
from typing import Any, Final

from transport.errors import ProtocolError
from transport.wire.decoder import Decoder
from transport.wire.format import Frame, FrameKind, Limits, encode

RECORD_LIMITS: Final = Limits(meta_nbytes=1024 * 1024, payload_nbytes=0)
READS_AT_ONCE: Final = 16  # of one stream, so that one rank that floods does not starve the others


class RecordStream:
    """Records over one non-blocking socket; both ends of a control connection use it.

    `limits` are what the other side is held to.

    Who was interrupted (Ctrl-C) in the midst of sending does not know what is sent. More would be
    nonsense to the other side, and hide what happened: whoever sends next ends the stream instead.
    """

    def __init__(self, sock: socket.socket, limits: Limits = RECORD_LIMITS) -> None:
        self.socket = sock
        if sock.family != socket.AF_UNIX:
            # Else a record waits 40 ms for the acknowledgement of the one before (tcp(7), Nagle).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.error: ProtocolError | None = None  # what nonsense ended the stream
        self.broken: OSError | None = None  # what else did, but for an orderly end
        self._decoder = Decoder(limits)
        self._sequence = 0
        self._unsent = bytearray()
        self._in_doubt = False  # while it sends, and for good if that is interrupted

    @property
    def unsent(self) -> bool:
        """Whether bytes wait for room in the kernel's buffer."""
        return bool(self._unsent) and not self._in_doubt

    def send(self, record: dict[str, Any]) -> None:
        """Queue a record and send what the kernel takes; OSError means the other side is gone."""
        frame = encode(FrameKind.RECORD, self._sequence, record)
        if self._in_doubt:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
            return
        self._in_doubt = True
        self._unsent += frame
        self._sequence += 1
        self._in_doubt = False
        self.flush()

    def flush(self) -> None:
        """Send what is queued as far as the kernel takes it."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self._in_doubt = True
                try:
                    nbytes = self.socket.send(self._unsent)
                except OSError as error:
                    self._in_doubt = False  # nothing is sent
                    if not isinstance(error, BlockingIOError):
                        # (The kernel tells it once: who reads next would see an orderly end.)
                        self.broken = self.broken or error
                    raise
                del self._unsent[:nbytes]
                self._in_doubt = False

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Return some of the records that are here, and whether the stream goes on.

        After nonsense it does not: `error` says why, and what came before it is still returned,
        because the last valid record of a rank may be the one that explains its end.
        """
        records: list[dict[str, Any]] = []
        try:
            for _ in range(READS_AT_ONCE):
                nbytes = self.socket.recv_into(self._decoder.buffer())
                if nbytes == 0:
                    return records, False
                self._decoder.received(nbytes)
                while (event := self._decoder.next_event()) is not None:
                    if isinstance(event, Frame):
                        records.append(_checked_record(event))
        except BlockingIOError:
            pass
        except ProtocolError as error:
            self.error = error
            return records, False
        except OSError as error:
            self.broken = self.broken or error
            return records, False
        return records, True


def await_ready(sock: socket.socket, events: int, timeout: float | None = None) -> None:
    """Sleep until the socket is ready, broken or closed, or `timeout` seconds are over."""
    fd = sock.fileno()
    if fd >= 0:
        poll = select.poll()  # select() cannot name a descriptor over 1023
        poll.register(fd, events)
        poll.poll(None if timeout is None else timeout * 1e3)


def _checked_record(frame: Frame) -> dict[str, Any]:
    meta = frame.meta
    if frame.kind is not FrameKind.RECORD or not isinstance(meta, dict):
        raise ProtocolError("only records travel on a control connection")
    if not isinstance(meta.get("record"), str):
        raise ProtocolError("a record without a name")
    return meta
