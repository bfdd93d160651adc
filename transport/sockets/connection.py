"""One stream between two ranks: frames queued out, frames read in, and how it ends.

It knows sockets and frames. What a frame means is its owner's business, which it asks through the
calls of `Owner`. Everything here runs under the lock of `Progress`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from select import EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from transport.errors import PeerLost, ProtocolError, TransportError
from transport.message.mailbox import Arrival
from transport.message.specs import MessageSpec
from transport.message.tensors import fill, memory, payload_sum
from transport.message.work import Send, Work
from transport.sockets.addresses import LARGE_NBYTES, acknowledged, tune, tune_for
from transport.sockets.event_loop import Progress
from transport.sockets.send_queue import Buffer, OutgoingQueue
from transport.wire.decoder import Decoder, PayloadDone
from transport.wire.format import MESSAGES, Frame, FrameKind, Limits, check_crc, encode, unpack

if TYPE_CHECKING:
    from transport.sockets.gpu_stager import Stager

READ_BUDGET_NBYTES: Final = 4 * 1024 * 1024  # read at one go before other connections get a turn
WRITE_BUDGET_NBYTES: Final = 4 * 1024 * 1024  # likewise
JOIN_NBYTES: Final = 4096  # a frame up to this is copied into one buffer, which costs less


class Owner(Protocol):
    """What a connection asks of the transport that it belongs to."""

    def on_frame(self, connection: Connection, frame: Frame) -> bool:
        """Make a message `connection.arriving`; return False to stop reading for now.

        While `connection.ending` the owner takes every frame.
        """

    def on_payload(self, connection: Connection, arrival: Arrival) -> None:
        """Take note that the message is complete, and no longer arriving."""

    def on_goodbye(self, connection: Connection) -> None:
        """Take note that nothing more will come."""

    def on_end(self, connection: Connection, error: TransportError) -> None:
        """Take note that the stream is over: `ProtocolError` for bad bytes, else `PeerLost`."""


class Connection:
    """The stream to one peer; frames may be queued before there is a socket."""

    def __init__(self, progress: Progress, owner: Owner, peer: int, limits: Limits) -> None:
        self.peer = peer
        self.socket: socket.socket | None = None
        self.ending = False  # the peer takes no more; what it had sent is read to the end
        self._progress = progress
        self._owner = owner
        self._limits = limits
        self._decoder = Decoder(limits, _read_meta)
        self._queue = OutgoingQueue()
        self._sequence = 0
        self.pending: Frame | None = None  # a frame that the owner has not taken yet
        # The message whose payload is coming in; it keeps the memory alive that the kernel fills.
        self.arriving: Arrival | None = None
        self._watched = 0
        # What a kind of connection reads before the first frame: False while it has not all come.
        self._before_frames: Callable[[], bool] | None = None

    @property
    def flushed(self) -> bool:
        """Whether all that was queued is with the peer's kernel, so that it outlives this side."""
        return self._queue.empty and (self.socket is None or acknowledged(self.socket))

    @property
    def connected(self) -> bool:
        """Whether there is a socket, so that another one is refused."""
        return self.socket is not None

    def attach(self, sock: socket.socket) -> None:
        """Start to read and write over an authenticated, non-blocking socket."""
        self.socket = sock
        with contextlib.suppress(OSError):  # the peer is gone: reading finds out how
            tune(sock)
        self._progress.register(sock.fileno(), EPOLLIN, self._on_events)
        self._watched = EPOLLIN
        self._flush()

    def queue(
        self,
        kind: FrameKind,
        meta: object,
        payload_nbytes: int = 0,
        tensors: Sequence[torch.Tensor] = (),
        work: Work | None = None,
        *,
        tag: int = 0,
        word: int = 0,
    ) -> None:
        """Send a frame now as far as the kernel takes it, and the rest when it takes more.

        `tensors` are the part of the payload that travels on the stream. They belong to the
        connection until the work is done.

        Raises:
            InvalidArgument: the frame is over the limits, which the peer has as well.
        """
        views = list(map(memory, tensors))
        short = payload_nbytes <= JOIN_NBYTES
        head = encode(
            kind,
            self._sequence,
            meta,
            payload_nbytes,
            self._limits,
            tag=tag,
            word=word,
            payload=views if short else (),
        )
        self._sequence += 1
        frame: list[Buffer] = [head] if short else [head, *views]
        first = self.socket is not None and not self._queue.frames and not self._queue.behind
        nbytes = self._offer(frame) if first else 0
        if nbytes == sum(map(len, frame)):  # the usual case
            if work is not None:
                work.complete()
            return
        self._queue.append(frame, () if short else tensors, work)
        self._queue.sent(nbytes)
        if first:
            self._flush()

    def take_place(
        self, spec: MessageSpec, work: Send
    ) -> Callable[[FrameKind, int, Sequence[torch.Tensor]], None]:
        """Queue a message without its payload; return what to call with kind, word and tensors."""
        encode(FrameKind.MESSAGE, 0, spec.packed, spec.nbytes, self._limits)  # says so now
        sequence, place = self._sequence, self._queue.take_place(work)
        self._sequence += 1

        def fill(kind: FrameKind, word: int, tensors: Sequence[torch.Tensor]) -> None:
            head = encode(kind, sequence, spec.packed, spec.nbytes, tag=work.tag, word=word)
            self._queue.fill_place(place, [head, *map(memory, tensors)], tensors)
            if self.socket is not None:
                self._flush()

        return fill

    def _offer(self, frame: list[Buffer]) -> int:
        """Offer a frame to the kernel; return how many bytes it took."""
        assert self.socket is not None
        try:
            if self.ending:
                return 0
            return self.socket.send(frame[0]) if len(frame) == 1 else self.socket.sendmsg(frame)
        except OSError:  # full or broken: `_flush` finds out which
            return 0

    def resume(self) -> None:
        """Offer the frame that was not taken once more, and read on if it is taken now."""
        if self.pending is not None and self.socket is not None:
            frame, self.pending = self.pending, None
            if self._drain(frame):
                self._watch()
            self._progress.wake()  # this may have completed what other threads wait for

    def close_socket(self) -> None:
        """Close the socket; what is queued stays where it is."""
        if self.socket is not None:
            self._progress.unregister(self.socket.fileno())
            self.socket.close()
            self.socket = None
        self.pending = None

    def detach(self, error: TransportError) -> None:
        """Close the socket and fail what is still queued."""
        self.close_socket()
        self._queue.fail(error)

    def _on_events(self, mask: int) -> None:
        if mask & EPOLLOUT:
            self._flush()
        if mask & ~EPOLLOUT and self.socket is not None and self.pending is None:
            self._read()

    def _watch(self) -> None:
        """Ask the kernel for just the events that can be used now."""
        if self.socket is None:
            return
        writing = self._queue.frames and not self.ending
        wanted = (0 if self.pending is not None else EPOLLIN) | (EPOLLOUT if writing else 0)
        if wanted == self._watched:
            return
        fd = self.socket.fileno()
        if not wanted:
            self._progress.unregister(fd)  # a mask of 0 would still report a hang-up, for ever
        elif not self._watched:
            self._progress.register(fd, wanted, self._on_events)
        else:
            self._progress.modify(fd, wanted)
        self._watched = wanted

    def _flush(self) -> None:
        assert self.socket is not None
        budget = WRITE_BUDGET_NBYTES
        try:
            while self._queue.frames and budget > 0 and not self.ending:
                nbytes = self.socket.sendmsg(self._queue.gathered())
                self._queue.sent(nbytes)
                budget -= nbytes
        except BlockingIOError:
            pass
        except ConnectionError:
            # The peer is gone, but what it sent before, perhaps a goodbye, can still be read. So
            # reading finds the end and says how it came; what the kernel holds is not much.
            self.ending = True
            self.resume()
        except OSError as error:
            self._end(error)
        self._watch()

    def _read(self) -> None:
        assert self.socket is not None
        if self._before_frames is not None and not self._before_frames():
            return
        decoder, budget = self._decoder, READ_BUDGET_NBYTES
        try:
            while budget > 0:
                room, arriving = decoder.buffer(), self.arriving
                nbytes = self.socket.recv_into(room)
                if nbytes == 0:
                    self._end(None)
                    return
                decoder.received(nbytes)
                # (Less than there was room for was all. And whoever got a large message may name
                # memory for the next one now: what is read before that has to be copied there.)
                if not self._drain() or nbytes < len(room) or arriving not in (None, self.arriving):
                    return
                budget -= nbytes
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(error)

    def _drain(self, event: Frame | PayloadDone | None = None) -> bool:
        """Handle all frames that are here, after `event` if any; False when reading has stopped."""
        try:
            if event is None:
                event = self._decoder.next_event()
            while event is not None:
                if isinstance(event, Frame):
                    if not self._begin(event):
                        return False
                elif self.arriving is not None:
                    self._owner.on_payload(self, self.arriving)
                if self.socket is None:
                    return False
                event = self._decoder.next_event()
        except (ProtocolError, PeerLost) as error:
            self._owner.on_end(self, error)
            return False
        return True

    def _begin(self, frame: Frame) -> bool:
        """Begin a frame, and end it if all of it is here; False when the owner does not take it."""
        if frame.kind is FrameKind.GOODBYE and not frame.payload_nbytes:
            self._owner.on_goodbye(self)
            return True
        if not self._owner.on_frame(self, frame):
            self.pending = frame
            self._watch()
            return False
        arrival = self.arriving
        assert arrival is not None
        payload = self._decoder.take_payload()
        if payload is None:
            self._decoder.receive_into([memory(tensor) for tensor in arrival.tensors])
        else:
            if payload:  # nothing of a lent message is on the stream
                fill(arrival.tensors, payload)
            self._owner.on_payload(self, arrival)
        return True

    def _end(self, error: OSError | None) -> None:
        where = "in the middle of a frame" if self._decoder.mid_frame else "without a goodbye"
        how = f" ({error.strerror})" if error is not None else ""
        message = f"the connection to rank {self.peer} ended {where}{how}"
        self._owner.on_end(self, PeerLost(message))


def _read_meta(kind: FrameKind, meta: bytes, crc: int) -> Any:
    if kind in MESSAGES:
        return MessageSpec.from_packed(meta, crc)
    check_crc(meta, crc)
    return unpack(meta)


# A connection that carries messages: which frame each becomes, and what it says of the payload.


class Carrier(Connection):
    """A stream with the payloads on it, summed or not; another carrier may know a better way."""

    def __init__(
        self, progress: Progress, owner: Owner, peer: int, limits: Limits, *, checksum: bool
    ) -> None:
        super().__init__(progress, owner, peer, limits)
        self._checksum = checksum
        self._large = False  # whether the socket is tuned for large messages
        self.stager: Stager | None = None  # for GPU tensors; None: there are none

    @property
    def settled(self) -> bool:
        """Whether nothing is at work any more for what has left; see cuda/transport.py."""
        return True

    def send(self, spec: MessageSpec, tensors: Sequence[torch.Tensor], work: Send) -> None:
        """Send a message's frame, and its payload.

        Raises:
            InvalidArgument: the message is over the limits.
        """
        if (spec.nbytes >= LARGE_NBYTES) != self._large and self.socket is not None:
            self._large = not self._large
            with contextlib.suppress(OSError):  # the peer is gone: whoever sends finds out
                tune_for(self.socket, spec.nbytes)
        if spec.on_gpu:
            self._stage(spec, tensors, work)
            return
        kind, word = FrameKind.MESSAGE, 0
        if self._checksum:
            kind, word = FrameKind.SUMMED, payload_sum(tensors)
        self.queue(kind, spec.packed, spec.nbytes, tensors, work, tag=work.tag, word=word)

    def _stage(self, spec: MessageSpec, tensors: Sequence[torch.Tensor], work: Send) -> None:
        """Send a message of which a part is on the GPU; it keeps its place until that is copied."""
        assert self.stager is not None
        place = self.take_place(spec, work)

        def fill(staged: Sequence[torch.Tensor]) -> None:
            if self._checksum:
                place(FrameKind.SUMMED, payload_sum(staged), staged)
            else:
                place(FrameKind.MESSAGE, 0, staged)

        self.stager.post(spec, tensors, fill)

    def detach(self, error: TransportError) -> None:
        """Close the socket, and fail what is still queued or copied."""
        super().detach(error)
        if self.stager is not None:
            self.stager.end()

    def join(self) -> None:
        """Wait for the threads of a connection that has ended; not to be called under the lock."""
        if self.stager is not None:
            self.stager.join()

    def fetch(self, frame: Frame, arrival: Arrival) -> None:
        """Take from the frame of a message that is not a plain one what it says of the payload.

        Raises:
            ProtocolError: it says what cannot be.
        """
        if frame.kind is FrameKind.LENT:
            raise ProtocolError(f"rank {self.peer} lends memory, but none was shown that is mapped")
        if frame.kind is FrameKind.APART:
            raise ProtocolError(f"rank {self.peer} sends a payload apart, but no path is open")
        arrival.sum = frame.word

    def finish(self, arrival: Arrival) -> None:
        """Check the payload, which is complete.

        Raises:
            ProtocolError: it is not what was sent.
        """
        if arrival.sum is not None and (found := payload_sum(arrival.tensors)) != arrival.sum:
            raise ProtocolError(
                f"the payload's sum is {found:#x}, {arrival.sum:#x} was "
                f"sent: bytes of the message with tag {arrival.tag} changed on the way"
            )
