"""Payloads that travel beside the stream: frames say what comes and in which order, lanes bring it.

A lane is one direction of a pair: a copy thread on each side, and a group of two between them.

    rank 0                                                       rank 1
    two ranks connect: a group of two is opened for each direction, then
    isend:  frame "apart" ────────── stream of the pair ───────> matched by the mailbox
            lane 0 → 1: send ────────────  group  ─────────────> lane 0 → 1: receive, complete

1. A lane moves payloads in the order in which their frames stand on the stream, on both sides. So
   nothing below it needs a tag, and the schedule's order never matters to it.
2. Each direction has a group of its own: a payload that its receiver does not take yet holds up
   the later ones of its lane, and nothing else.
3. While a payload is under way the next frame is not taken: messages of a pair stay in order, and
   what the receiver has not asked for stays bounded, as if the payload were on the stream.
4. The stream says how a peer ended. A receive that breaks is the loss of the peer. A send that
   breaks may be an orderly end as well, so the stream is read first (`BROKEN`). And when the stream
   is over the lane says which of the last sends the peer had taken (`PARTING`).

    NEW ── attach ──> OPENING ── lanes are open ──> OPEN ── stream over, sends left ──> PARTING
                                                     │  └── nothing left to send ──┐        │
                                             a send broke                          │   sends done,
                                                     └──> BROKEN ── the grace ──> ENDED <── broken,
                                                                    is over                too late
"""

from __future__ import annotations

import abc
import contextlib
import enum
import functools
import re
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

import torch

from transport.errors import PeerLost, ProtocolError, TransportError
from transport.message.mailbox import Arrival, Mailbox
from transport.message.specs import MessageSpec
from transport.message.tensors import payload_sum
from transport.message.work import Send
from transport.sockets.connection import Connection
from transport.sockets.copy_thread import CopyThread, Group
from transport.sockets.transport import UnixTransport
from transport.wire.format import Frame, FrameKind

OPEN_TIMEOUT_S: Final = 30.0  # for two ranks that are connected to open their groups
STREAM_GRACE_S: Final = 5.0  # after a send broke, for the stream to say how the peer ended
LOOK_S: Final = 5.0  # between two looks whether a stream that is not read has ended


class State(enum.Enum):
    """Where a connection with lanes stands."""

    NEW = enum.auto()  # there is no socket
    OPENING = enum.auto()  # a thread opens the lanes over the socket; no frame has passed
    OPEN = enum.auto()  # frames pass on the stream, payloads by the lanes
    BROKEN = enum.auto()  # the outgoing lane is: the stream is read on, to say how the peer ended
    PARTING = enum.auto()  # the stream is over: the lane has still to say how the last sends went
    ENDED = enum.auto()


class OffStreamConnection(Connection):
    """A stream, and a lane in each direction that is open before the first frame."""

    def __init__(self, owner: OffStreamTransport, mailbox: Mailbox, peer: int) -> None:
        super().__init__(owner, mailbox, peer)
        self.state = State.NEW
        self.leaving: deque[Send] = deque()  # what the outgoing lane has to send, or sends
        out, into = f"barepp-lane-{owner.rank}-{peer}", f"barepp-lane-{peer}-{owner.rank}"
        self.outgoing = CopyThread(out, owner.progress, self._on_send_broke)
        self.incoming = CopyThread(into, owner.progress, self._on_receive_broke)
        self._means = owner
        self._sums = owner.checksum and owner.sums
        self._opening: socket.socket | None = None  # while that is the other thread's
        self._verdict: Callable[[], None] = lambda: None  # while parting: how the stream ended
        self._looking = False  # whether `_look` will be called

    @property
    def flushed(self) -> bool:
        """Whether all that was queued has left, payloads too."""
        return not self.leaving and self.state is not State.OPENING and super().flushed

    @property
    def connected(self) -> bool:
        """Whether there is or was a socket, if only to open the lanes over it."""
        return self.state is not State.NEW

    @property
    def _awaits_lane(self) -> bool:
        """Whether the outgoing lane has still to say how the last sends went."""
        return self.state is State.OPEN and bool(self.leaving)

    def attach(self, sock: socket.socket) -> None:
        """Open the lanes over the authenticated socket, in a thread; then read and write frames."""
        self.state, self._opening = State.OPENING, sock
        name = f"{self.outgoing.name}-opening"
        threading.Thread(target=self._open_lanes, args=(sock,), name=name, daemon=True).start()

    def close_socket(self) -> None:
        """Close the socket, also one over which lanes are still being opened."""
        if self._opening is not None:
            self.state = State.ENDED
            with contextlib.suppress(OSError):
                self._opening.shutdown(socket.SHUT_RDWR)  # its thread closes it
            self._opening = None
        super().close_socket()

    def detach(self, error: TransportError) -> None:
        """Close the socket, end the lanes and fail what they still had to send."""
        super().detach(error)
        self.state = State.ENDED
        for lane in (self.outgoing, self.incoming):
            lane.end()
        while self.leaving:
            self.leaving.popleft().fail(error)

    def join(self) -> None:
        """Wait for the threads of a connection that has ended."""
        super().join()
        for lane in (self.outgoing, self.incoming):
            lane.join()

    def send(self, spec: MessageSpec, tensors: Sequence[torch.Tensor], work: Send) -> None:
        """Send a message's frame, and its payload by the lane if that is its way."""
        if not self._means.goes_apart(spec, tensors):
            super().send(spec, tensors, work)
            return
        word = payload_sum(tensors) if self._sums else 0
        self.queue(FrameKind.APART, spec.packed, spec.nbytes, tag=work.tag, word=word)
        self.leaving.append(work)
        self.outgoing.post(tensors, self._on_sent, self._means.ready())

    def _begin(self, frame: Frame) -> bool:
        """Begin a frame unless a payload is under way (rule 3)."""
        if self.arriving is not None:
            self._hold(frame)
            if not self._looking:
                self._look()
            return False
        return super()._begin(frame)

    def _locate(self, frame: Frame, arrival: Arrival) -> None:
        """Take from a message's frame what it says of the payload."""
        if frame.kind is not FrameKind.APART:
            super()._locate(frame, arrival)
            return
        arrival.tensors = self._means.room(arrival.spec)
        if self._sums:
            arrival.sum = frame.word

    def _begin_payload(self, frame: Frame, arrival: Arrival) -> None:
        """Let the lane bring the payload if it is not on the stream."""
        if frame.kind is not FrameKind.APART:
            super()._begin_payload(frame, arrival)
            return
        self._decoder.take_payload()  # none of it is on the stream
        done = functools.partial(self._on_received, arrival)
        self.incoming.post(arrival.tensors, done, self._means.ready())

    def _look(self, *, ended: bool = False) -> None:
        """Lose a peer whose stream had ended a look ago, and whose payload still is not here.

        While a frame is held the stream is not read, and a lane may never learn that its peer has
        died (see `GlooGroup.abort`). So somebody has to look for the stream's end.
        """
        self._looking = self.arriving is not None and self.socket is not None
        if not self._looking or self.socket is None:
            return
        if ended:
            gone = f"rank {self.peer} ended while its payload was on the way"
            self._owner.on_end(self, PeerLost(gone))
            return
        poller = select.poll()
        poller.register(self.socket, select.POLLRDHUP)
        again = functools.partial(self._look, ended=bool(poller.poll(0)))
        self._progress.call_after(LOOK_S, again)

    # -- the end of the stream ---------------------------------------------------------------------

    def _on_goodbye(self) -> None:
        if self._awaits_lane:
            self._part(super()._on_goodbye)
        else:
            super()._on_goodbye()

    def _end(self, error: OSError | None) -> None:
        """Take note that the stream is over, which it is after a goodbye in any case."""
        if self.state is State.PARTING:
            self.close_socket()
        elif self._owner.closing and self._awaits_lane and self._queue.empty:
            self.close_socket()  # (it may have hung up in answer to our goodbye)
            self._part(functools.partial(super()._end, error))
        else:
            super()._end(error)

    def _part(self, verdict: Callable[[], None]) -> None:
        """Tell the owner how it ended as soon as the lane has said how the last sends went.

        The peer may have taken them and left before the lane has noticed; if not, the lane breaks.
        """
        self.state, self._verdict = State.PARTING, verdict
        self._progress.call_after(STREAM_GRACE_S, self._end_parting)

    def _end_parting(self) -> None:
        if self.state is State.PARTING:
            self.state = State.ENDED
            self._verdict()

    # -- what the lanes tell, under the lock -------------------------------------------------------

    def _on_sent(self) -> None:
        self.leaving.popleft().complete()
        if not self.leaving:
            self._end_parting()

    def _on_send_broke(self, error: Exception) -> None:
        self._end_parting()
        if self.state is State.OPEN:
            self.state, self.ending = State.BROKEN, True
            self.resume()
            lost = self._broken("to", error)
            self._progress.call_after(STREAM_GRACE_S, lambda: self._owner.on_end(self, lost))

    def _on_received(self, arrival: Arrival) -> None:
        try:
            self._received(arrival)
        except ProtocolError as error:
            self._owner.on_end(self, error)
        else:
            self.resume()

    def _on_receive_broke(self, error: Exception) -> None:
        if self.state is not State.PARTING:
            self._owner.on_end(self, self._broken("from", error))

    def _broken(self, direction: str, error: Exception) -> PeerLost:
        return _lost(f"the payload path {direction} rank {self.peer} broke", error)

    def _open_lanes(self, sock: socket.socket) -> None:
        broken: Exception | None = None
        try:
            sock.settimeout(OPEN_TIMEOUT_S)
            groups = self._means.open_groups(self.peer, sock)
            sock.setblocking(False)
        except Exception as error:  # torch's own, or the socket's
            broken = error.with_traceback(None)
        with self._progress.lock, self._progress.guard:
            opening, self._opening = self._opening, None
            if opening is None or broken is not None:
                sock.close()
            if opening is None:  # it all ended meanwhile
                return
            if broken is not None:
                self.state = State.ENDED
                lost = _lost(f"no payload path to rank {self.peer} could be opened", broken)
                self._owner.on_end(self, lost)
            else:
                for lane, group in zip((self.outgoing, self.incoming), groups, strict=True):
                    lane.start(group)
                self.state = State.OPEN
                super().attach(sock)
            self._progress.wake()  # messages may have left, or failed, for which others wait


class OffStreamTransport(UnixTransport):
    """Frames over Unix streams or TCP; payloads by what a subclass opens between two ranks."""

    connection_class: ClassVar[type[Connection]] = OffStreamConnection
    sums: ClassVar[bool] = True  # whether a payload can be summed where it lies

    @abc.abstractmethod
    def open_groups(self, peer: int, sock: socket.socket) -> tuple[Group, Group]:
        """Open the groups out to a peer and in from it; the peer does the same at the same time.

        `sock` is a blocking one, theirs alone until both have returned. Called in any thread.
        """

    @abc.abstractmethod
    def goes_apart(self, spec: MessageSpec, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a message's payload travels beside the stream."""

    def room(self, spec: MessageSpec) -> Sequence[torch.Tensor]:
        """Return where such a payload is to come; empty: where one from the stream would."""
        return ()

    def ready(self) -> object:
        """Return what a group has to await before it touches the tensors that are posted now."""
        return None


def _lost(what: str, error: Exception) -> PeerLost:
    """Return the loss with its cause's first sentence, without the source line before that."""
    said = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]
    lost = PeerLost(f"{what}: {said}")
    lost.__cause__ = error.with_traceback(None)
    return lost
