"""One stream between two ranks: tensors go out as frames, frames that come in go to the mailbox.

    send:     frame ──> queue ──────────> socket
    receive:  socket ──> decoder ──> mailbox ──> the receive that wants the message

1. All of it runs under the lock of `Progress`, and nothing here blocks.
2. A frame leaves at once as far as the kernel takes it. The rest is queued by reference, in order,
   and leaves when the kernel has room.
3. A message meets the mailbox when its frame is here. The mailbox names the memory, and the kernel
   writes the payload straight into it.
4. Memory is bounded: a message that no receive wants, beyond `unexpected_limit`, is left `pending`,
   and the stream is not read on. While a thread of this rank waits it is read all the same: to stop
   then could deadlock.
5. A stream that broke, or whose bytes make no sense, is never used again: its owner ends it.

A kind of connection that has another way for payloads (shared memory, a GPU, gloo, NCCL) overrides
`send`, and `_locate`, which names the memory of a payload that arrives.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from select import EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import torch

from transport.errors import PeerLost, ProtocolError, TransportError
from transport.message.mailbox import Arrival, Mailbox
from transport.message.specs import MessageSpec
from transport.message.tensors import fill, memory, payload_sum
from transport.message.work import Send, Traffic, Work
from transport.sockets.addresses import LARGE_NBYTES, acknowledged, tune, tune_for
from transport.sockets.event_loop import Progress
from transport.wire.decoder import Decoder, PayloadDone
from transport.wire.format import MESSAGES, Frame, FrameKind, Limits, check_crc, encode, unpack

if TYPE_CHECKING:
    from transport.device import Gpu
    from transport.sockets.gpu_stager import Stager

READ_BUDGET_NBYTES: Final = 4 * 1024 * 1024  # read at one go before other connections get a turn
WRITE_BUDGET_NBYTES: Final = 4 * 1024 * 1024  # likewise
JOIN_NBYTES: Final = 4096  # a frame up to this is copied into one buffer, which costs less
MAX_GATHER: Final = 64  # buffers in one sendmsg; the kernel's own limit is 1024 (IOV_MAX)

Buffer: TypeAlias = "bytes | memoryview"


class Owner(Protocol):
    """What a connection needs of the transport that it belongs to."""

    rank: int
    gpu: Gpu | None
    progress: Progress
    traffic: Traffic
    limits: Limits  # of a frame, in both directions
    unexpected_limit: int  # bytes of messages that no receive wants
    checksum: bool  # whether the payloads that are sent carry a sum

    @property
    def closing(self) -> bool:
        """Whether this rank has said goodbye to all others."""

    def on_goodbye(self, connection: Connection) -> None:
        """Take note that nothing more will come."""

    def on_end(self, connection: Connection, error: TransportError) -> None:
        """Take note that the stream is over: `ProtocolError` for bad bytes, else `PeerLost`."""


class Connection:
    """The stream to one peer; frames may be queued before there is a socket."""

    def __init__(self, owner: Owner, mailbox: Mailbox, peer: int) -> None:
        self.peer = peer
        self.socket: socket.socket | None = None
        self.ending = False  # the peer takes no more; what it had sent is read to the end
        self.lost = False  # the stream broke, or the peer could not be reached
        self.ended: TransportError | None = None  # why nothing can be sent or received any more
        self.pending: Frame | None = None  # a message that is not taken yet (rule 4)
        # The message whose payload is coming in; it keeps the memory alive that the kernel fills.
        self.arriving: Arrival | None = None
        self.stager: Stager | None = None  # for tensors on this rank's GPU; None: it has none
        self._owner = owner
        self._mailbox = mailbox
        self._progress = owner.progress
        self._limits = owner.limits
        self._checksum = owner.checksum
        self._decoder = Decoder(owner.limits, _read_meta)
        self._queue = OutgoingQueue()
        self._sequence = 0
        self._large = False  # whether the socket is tuned for large messages
        self._watched = 0  # the epoll events that are asked for
        # What a kind of connection reads before the first frame: False while it has not all come.
        self._before_frames: Callable[[], bool] | None = None
        if owner.gpu is not None:
            from transport.sockets.gpu_stager import Stager

            self.stager = Stager(owner.gpu, (owner.rank, peer), owner.progress)

    @property
    def flushed(self) -> bool:
        """Whether all that was queued is with the peer's kernel, so that it outlives this side."""
        return self._queue.empty and (self.socket is None or acknowledged(self.socket))

    @property
    def settled(self) -> bool:
        """Whether nothing is at work any more for what has left; see cuda/transport.py."""
        return True

    @property
    def may_close(self) -> bool:
        """Whether a rank that closes need not wait for this connection any more."""
        return (self.lost or self.ended is not None or self.flushed) and self.settled

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

    def _stage(self, spec: MessageSpec, tensors: Sequence[torch.Tensor], work: Send) -> None:
        """Send a message of which a part is on the GPU; it keeps its place until that is copied."""
        assert self.stager is not None
        encode(
            FrameKind.MESSAGE, 0, spec.packed, spec.nbytes, self._limits
        )  # raises now if too long
        sequence, place = self._sequence, self._queue.take_place(work)
        self._sequence += 1

        def fill_place(staged: Sequence[torch.Tensor]) -> None:
            kind, word = FrameKind.MESSAGE, 0
            if self._checksum:
                kind, word = FrameKind.SUMMED, payload_sum(staged)
            head = encode(kind, sequence, spec.packed, spec.nbytes, tag=work.tag, word=word)
            self._queue.fill_place(place, [head, *map(memory, staged)], staged)
            if self.socket is not None:
                self._flush()

        self.stager.post(spec, tensors, fill_place)

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
        """Offer the pending message once more, and read on if it is taken now."""
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
        """End for good: fail what is still queued or copied, and what was coming in."""
        self.ended = error
        self.close_socket()
        self._queue.fail(error)
        arrival, self.arriving = self.arriving, None
        if arrival is not None and arrival.receive is not None:
            arrival.receive.fail(error)
        if self.stager is not None:
            self.stager.end()

    def join(self) -> None:
        """Wait for the threads of a connection that has ended; not to be called under the lock."""
        if self.stager is not None:
            self.stager.join()

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
                    self._received(self.arriving)
                if self.socket is None:
                    return False
                event = self._decoder.next_event()
        except (ProtocolError, PeerLost) as error:
            self._owner.on_end(self, error)
            return False
        return True

    def _begin(self, frame: Frame) -> bool:
        """Begin a frame, and end it if all of it is here; False when it has to wait."""
        if frame.kind is FrameKind.GOODBYE and not frame.payload_nbytes:
            self._decoder.take_payload()
            self._on_goodbye()
            return True
        arrival = self._arrive(frame)
        if arrival is None:
            self._hold(frame)
            return False
        self._begin_payload(frame, arrival)
        return True

    def _arrive(self, frame: Frame) -> Arrival | None:
        """Give a message to the mailbox, which names its memory; None when it has to wait."""
        src, kind, tag, mailbox = self.peer, frame.kind, frame.tag, self._mailbox
        if kind not in MESSAGES:
            raise ProtocolError(f"rank {src} sent a {kind.name} out of place")
        spec: MessageSpec = frame.meta
        if spec.nbytes != frame.payload_nbytes:
            spec.fit(frame.payload_nbytes)  # raises
        if not mailbox.wanted(src, tag) and not self.ending:
            waiting = self._progress.driver is not None and not self._owner.closing
            over = mailbox.held_nbytes(src) + spec.nbytes > self._owner.unexpected_limit
            if over and not waiting:
                return None
        arrival = self.arriving = Arrival(src, tag, spec)
        try:
            if kind is not FrameKind.MESSAGE:
                self._locate(frame, arrival)
            mailbox.arrive(arrival)
        except RuntimeError as error:  # torch's allocator
            raise ProtocolError(f"no memory for {spec} from rank {src}: {error}") from error
        return arrival

    def _locate(self, frame: Frame, arrival: Arrival) -> None:
        """Take from the frame of a message that is not a plain one what it says of the payload.

        Raises:
            ProtocolError: it says what cannot be.
        """
        if frame.kind is FrameKind.LENT:
            raise ProtocolError(f"rank {self.peer} lends memory, but none was shown that is mapped")
        if frame.kind is FrameKind.APART:
            raise ProtocolError(f"rank {self.peer} sends a payload apart, but no path is open")
        arrival.sum = frame.word

    def _begin_payload(self, frame: Frame, arrival: Arrival) -> None:
        """Let the kernel write the payload to its memory, unless it came with the frame."""
        payload = self._decoder.take_payload()
        if payload is None:
            self._decoder.receive_into([memory(tensor) for tensor in arrival.tensors])
        else:
            if payload:  # (nothing of a lent message is on the stream)
                fill(arrival.tensors, payload)
            self._received(arrival)

    def _received(self, arrival: Arrival) -> None:
        """Check the payload, which is complete now, and complete the message.

        Raises:
            ProtocolError: the payload is not what was sent.
        """
        if arrival.sum is not None and (found := payload_sum(arrival.tensors)) != arrival.sum:
            raise ProtocolError(
                f"the payload's sum is {found:#x}, {arrival.sum:#x} was "
                f"sent: bytes of the message with tag {arrival.tag} changed on the way"
            )
        self.arriving = None
        traffic = self._owner.traffic
        traffic.received[self.peer] += 1
        traffic.received_nbytes += arrival.spec.nbytes
        self._mailbox.complete(arrival)

    def _hold(self, frame: Frame) -> None:
        """Leave a frame for later, and stop reading."""
        self.pending = frame
        self._watch()

    def _on_goodbye(self) -> None:
        self._owner.on_goodbye(self)

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


class Outgoing:
    """One frame on its way out. It keeps the tensors alive whose memory its buffers view."""

    __slots__ = ("buffers", "tensors", "work")

    def __init__(
        self, frame: Sequence[Buffer], tensors: Sequence[torch.Tensor], work: Work | None
    ) -> None:
        self.buffers = deque(memoryview(part) for part in frame)
        self.tensors = tensors
        self.work = work


class OutgoingQueue:
    """What one connection still has to send: `frames`, in order, then `behind`.

    The first of `behind` is a place that is taken: its payload is not in memory yet. All that was
    queued since waits for it.
    """

    def __init__(self) -> None:
        self.frames: deque[Outgoing] = deque()
        self.behind: deque[Outgoing] = deque()

    @property
    def empty(self) -> bool:
        """Whether there is nothing left to send, nor will be."""
        return not self.frames and not self.behind

    def append(
        self, frame: Sequence[Buffer], tensors: Sequence[torch.Tensor], work: Work | None
    ) -> None:
        """Queue a frame, header first; `work` is done when the last byte of it is sent."""
        (self.behind or self.frames).append(Outgoing(frame, tensors, work))

    def take_place(self, work: Work) -> Outgoing:
        """Queue a frame that `fill_place` will give later."""
        place = Outgoing((), (), work)
        self.behind.append(place)
        return place

    def fill_place(
        self, place: Outgoing, frame: Sequence[Buffer], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Give the frame for a place; all up to the next empty one may leave now."""
        place.buffers.extend(memoryview(part) for part in frame)
        place.tensors = tensors
        while self.behind and self.behind[0].buffers:
            self.frames.append(self.behind.popleft())

    def gathered(self) -> Iterator[memoryview]:
        """Yield the buffers that are to be sent next, in one call to the kernel."""
        return itertools.islice((b for frame in self.frames for b in frame.buffers), MAX_GATHER)

    def sent(self, nbytes: int) -> None:
        """Take note of what the kernel took."""
        while self.frames:
            buffers = self.frames[0].buffers
            while buffers and nbytes >= len(buffers[0]):
                nbytes -= len(buffers.popleft())
            if buffers:
                if nbytes:
                    buffers[0] = buffers[0][nbytes:]
                return
            work = self.frames.popleft().work
            if work is not None:
                work.complete()

    def fail(self, error: TransportError) -> None:
        """Fail all that is queued."""
        for queued in (self.frames, self.behind):
            while queued:
                work = queued.popleft().work
                if work is not None:
                    work.fail(error)
