"""Shared memory between ranks of one host: the payload is written once and used where it lies.

    rank 0                                                   rank 1
    attach: my arena's descriptor (SCM_RIGHTS) ────────────> maps it
            maps it <──────────────────────────────────────  my arena's descriptor
    isend:  copy into a block of my arena
            frame "lent", word = the block's offset ───────> tensors over the block, no copy
                                                             storage freed: the block's state = 0

Everything but the payload stays as it is with Unix streams: frames, matching, order, death. Small
messages, and those for which no block is free, travel on the stream, so nothing ever waits for a
block. Ranks of other hosts are reached over TCP. How blocks are lent is in arena.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import ClassVar, Final

import torch

from transport.errors import ProtocolError
from transport.message.mailbox import Arrival, Mailbox
from transport.message.specs import MessageSpec
from transport.message.work import Send
from transport.shm.arena import BorrowedMemory, LendingArena
from transport.sockets.connection import Connection, Owner
from transport.sockets.transport import UnixTransport
from transport.wire.format import Frame, FrameKind

LEND_NBYTES: Final = 128 * 1024  # below this the stream's two copies cost no more
LENT_META_NBYTES: Final = 256  # a message with longer metadata, of very many tensors, is not lent
_WITH_ARENA: Final = b"\1"
_WITHOUT: Final = b"\0"  # no memory for an arena: all payloads travel on the stream


class LendingConnection(Connection):
    """A stream whose ends show each other their arenas before the first frame."""

    def __init__(self, owner: Owner, mailbox: Mailbox, peer: int) -> None:
        super().__init__(owner, mailbox, peer)
        self.lender: LendingArena | None = None
        self.borrowed: BorrowedMemory | None = None

    def attach(self, sock: socket.socket) -> None:
        """Show the arena, then start to read and write."""
        if sock.family == socket.AF_UNIX:
            self._before_frames = self._take_greeting
            self._show_arena(sock)
        super().attach(sock)

    def close_socket(self) -> None:
        """Close the socket; tensors that lie in the peer's arena keep it alive by themselves."""
        super().close_socket()
        self.lender = self.borrowed = None

    def send(self, spec: MessageSpec, tensors: Sequence[torch.Tensor], work: Send) -> None:
        """Send a message's frame, and its payload through shared memory if that is better."""
        lends = spec.nbytes >= LEND_NBYTES and not spec.on_gpu
        offset = self._lend(spec, tensors) if lends else None
        if offset is None:
            super().send(spec, tensors, work)
            return
        self.queue(FrameKind.LENT, spec.packed, spec.nbytes, tag=work.tag, word=offset)
        work.complete()

    def _locate(self, frame: Frame, arrival: Arrival) -> None:
        """Take from a message's frame where the payload lies."""
        if frame.kind is FrameKind.LENT and self.borrowed is not None:
            arrival.tensors = self.borrowed.take(frame.word, arrival.spec)
        else:
            super()._locate(frame, arrival)

    def _received(self, arrival: Arrival) -> None:
        """Complete the message, and say how the next ones had better come."""
        super()._received(arrival)
        large = arrival.spec.nbytes >= LEND_NBYTES and not arrival.spec.on_gpu
        receive = arrival.receive
        if large and receive is not None and self.borrowed is not None:
            self.borrowed.wish(lent=receive.into is None)

    def _lend(self, spec: MessageSpec, tensors: Sequence[torch.Tensor]) -> int | None:
        """Copy a message into a block; return its offset, or None when the stream is to take it."""
        lender, limits = self.lender, self._limits
        # (What is over the limits is left to the stream, which says so.)
        if (
            lender is None
            or not lender.wanted(stream_busy=bool(self._queue.frames))
            or spec.nbytes > limits.payload_nbytes
            or len(spec.packed.data) > min(limits.meta_nbytes, LENT_META_NBYTES)
        ):
            return None
        return lender.lend(spec, tensors)

    def _show_arena(self, sock: socket.socket) -> None:
        try:
            lender = self._new_lender()
            with contextlib.closing(lender):  # one byte always fits into an empty buffer
                socket.send_fds(sock, [_WITH_ARENA], [lender.fd])
            self.lender = lender
        except OSError:  # no memory, or too many descriptors under way, for example
            with contextlib.suppress(OSError):  # the peer is gone: reading finds out how
                sock.send(_WITHOUT)

    def _take_greeting(self) -> bool:
        """Take the peer's arena; False when it has not come yet, or never will."""
        assert self.socket is not None
        try:
            data, fds, flags, _ = socket.recv_fds(self.socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(error)
            return False
        if not data:
            self._end(None)
            return False
        try:
            self._before_frames = None
            if fds:
                self._map(fds[0])
            # (A process without a descriptor left gets the byte alone, and this flag: recvmsg(2).)
            shown = fds or flags & socket.MSG_CTRUNC
            if data != (_WITH_ARENA if shown else _WITHOUT):
                raise ProtocolError(f"{data!r} with {len(fds)} descriptors is no greeting")
        except ProtocolError as error:
            self._owner.on_end(self, error)
            return False
        return True

    def _map(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # the peer sees that nobody has mapped it
            self.borrowed = self._new_borrowed(fd)

    def _new_lender(self) -> LendingArena:
        return LendingArena()

    def _new_borrowed(self, fd: int) -> BorrowedMemory:
        return BorrowedMemory(fd)


class ShmTransport(UnixTransport):
    """Unix streams with payloads in shared memory between ranks of one host, TCP between others."""

    name: ClassVar[str] = "shm"
    connection_class: ClassVar[type[Connection]] = LendingConnection

    @staticmethod
    def viable() -> str | None:
        """Return why this machine cannot lend memory, None when it can."""
        if not hasattr(os, "memfd_create") or not hasattr(socket, "send_fds"):
            return "this system has no memfd_create(2), or cannot pass descriptors"
        return UnixTransport.viable()
