"""Payloads that travel beside the stream: frames say what comes and in which order, lanes bring it.

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
4. The stream says how a peer ended. A receive that breaks is the loss of the peer; a send that
   breaks may be an orderly end as well, so the stream is read first. And after a goodbye the lane
   says which of the last sends the peer had taken.
"""

from __future__ import annotations

import abc
import contextlib
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

import torch

from transport.errors import PeerLost, ProtocolError, TransportError
from transport.message.mailbox import Arrival
from transport.message.specs import MessageSpec
from transport.message.tensors import payload_sum
from transport.message.work import Send
from transport.sockets.connection import Carrier
from transport.sockets.copy_thread import CopyThread, Group
from transport.sockets.event_loop import Progress
from transport.sockets.transport import UnixTransport
from transport.wire.format import Frame, FrameKind, Limits

OPEN_TIMEOUT_S: Final = 30.0  # for two ranks that are connected to open their groups
STREAM_GRACE_S: Final = 5.0  # after a send broke, for the stream to say how the peer ended
LOOK_S: Final = 5.0  # between two looks whether a stream that is not read has ended


class OffStreamConnection(Carrier):
    """A stream, and a lane in each direction that is open before the first frame."""

    def __init__(
        self,
        progress: Progress,
        owner: OffStreamTransport,
        peer: int,
        limits: Limits,
        *,
        checksum: bool,
    ) -> None:
        super().__init__(progress, owner, peer, limits, checksum=checksum)
        self.outgoing = CopyThread(
            f"barepp-lane-{owner.rank}-{peer}", progress, self._on_send_broke
        )
        self.incoming = CopyThread(
            f"barepp-lane-{peer}-{owner.rank}", progress, self._on_receive_broke
        )
        self.leaving: deque[Send] = deque()  # what the outgoing lane has to send, or sends
        self._sends_broke = False  # so that nothing more will be told of those
        self._means = owner
        self._sums = checksum and owner.sums
        self._verdict: Callable[[], None] | None = None  # how it ended, while the lane may go on
        self._looking = False  # whether `_look` will be called
        self._opening: socket.socket | None = None

    @property
    def flushed(self) -> bool:
        """Whether all that was queued has left, payloads too."""
        return not self.leaving and self._opening is None and super().flushed

    @property
    def _awaits_lane(self) -> bool:
        """Whether the outgoing lane has still to say how the last sends went."""
        return bool(self.leaving) and not self._sends_broke

    @property
    def connected(self) -> bool:
        """Whether there is or was a socket, if only to open the lanes over it."""
        return self._opening is not None or self.parting or super().connected

    @property
    def parting(self) -> bool:
        """Whether all is over but the last sends: the lane has still to say how they went."""
        return self._verdict is not None

    def attach(self, sock: socket.socket) -> None:
        """Open the lanes over the authenticated socket, in a thread; then read and write frames."""
        self._opening = sock
        name = f"{self.outgoing.name}-opening"
        threading.Thread(target=self._open_lanes, args=(sock,), name=name, daemon=True).start()

    def close_socket(self) -> None:
        """Close the socket, also one over which lanes are still being opened."""
        if self._opening is not None:
            with contextlib.suppress(OSError):
                self._opening.shutdown(socket.SHUT_RDWR)  # its thread closes it
            self._opening = None
        super().close_socket()

    def detach(self, error: TransportError) -> None:
        """Close the socket, end the lanes and fail what they still had to send."""
        super().detach(error)
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

    def fetch(self, frame: Frame, arrival: Arrival) -> None:
        """Take from a message's frame what it says of the payload."""
        if frame.kind is not FrameKind.APART:
            super().fetch(frame, arrival)
            return
        arrival.tensors = self._means.room(arrival.spec)
        if self._sums:
            arrival.sum = frame.word

    def _begin(self, frame: Frame) -> bool:
        """Begin a frame unless a payload is under way, which may be one for the lane to bring."""
        if self.arriving is not None:
            self._hold(frame)
            return False
        if frame.kind is FrameKind.GOODBYE and self._awaits_lane and not frame.payload_nbytes:
            self._decoder.take_payload()
            self._part(lambda: self._owner.on_goodbye(self))
            return True
        if frame.kind is not FrameKind.APART:
            return super()._begin(frame)
        if not self._owner.on_frame(self, frame):
            self.pending = frame
            self._watch()
            return False
        arrival = self.arriving
        assert arrival is not None
        self._decoder.take_payload()  # none of it is on the stream
        self.incoming.post(arrival.tensors, lambda: self._on_received(arrival), self._means.ready())
        return True

    def _end(self, error: OSError | None) -> None:
        """Take note that the stream is over, which it is after a goodbye in any case."""
        if self.parting:
            self.close_socket()
        elif self._means.closing and self._awaits_lane and self._queue.empty:
            self.close_socket()  # (it may have hung up in answer to our goodbye)
            self._part(lambda: Carrier._end(self, error))
        else:
            super()._end(error)

    def _hold(self, frame: Frame) -> None:
        """Let a frame wait for the payload that is under way.

        Until it is here the stream is not read, and a lane may never learn that its peer has died
        (see `GlooGroup.abort`). So somebody has to look for the stream's end.
        """
        self.pending = frame
        self._watch()
        if not self._looking:
            self._looking = True
            self._progress.call_at(time.monotonic() + LOOK_S, lambda: self._look(ended=False))

    def _look(self, *, ended: bool) -> None:
        """Lose a peer whose stream had ended a while ago, and whose payload still is not here."""
        self._looking = False
        if self.arriving is None or self.socket is None:
            return
        if ended:
            gone = f"rank {self.peer} ended while its payload was on the way"
            self._owner.on_end(self, PeerLost(gone))
            return
        poller = select.poll()
        poller.register(self.socket, select.POLLRDHUP)
        ended = bool(poller.poll(0))
        self._looking = True
        self._progress.call_at(time.monotonic() + LOOK_S, lambda: self._look(ended=ended))

    def _part(self, verdict: Callable[[], None]) -> None:
        """Tell the owner how it ended as soon as the lane has said how the last sends went.

        The peer may have taken them and left before the lane has noticed; if not, the lane breaks.
        """
        self._verdict = verdict
        self._progress.call_at(time.monotonic() + STREAM_GRACE_S, self._end_parting)

    def _end_parting(self) -> None:
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            verdict()

    # -- what the lanes tell, under the lock -------------------------------------------------------

    def _on_sent(self) -> None:
        self.leaving.popleft().complete()
        if not self.leaving:
            self._end_parting()

    def _on_received(self, arrival: Arrival) -> None:
        try:
            self._owner.on_payload(self, arrival)
        except ProtocolError as error:
            self._owner.on_end(self, error)
        else:
            self.resume()

    def _on_receive_broke(self, error: Exception) -> None:
        if not self.parting:
            self._owner.on_end(self, self._broken("from", error))

    def _on_send_broke(self, error: Exception) -> None:
        if self.parting:
            self._end_parting()
            return
        lost = self._broken("to", error)
        self._sends_broke = self.ending = True
        self.resume()
        due = time.monotonic() + STREAM_GRACE_S
        self._progress.call_at(due, lambda: self._owner.on_end(self, lost))

    def _broken(self, direction: str, error: Exception) -> PeerLost:
        lost = PeerLost(f"the payload path {direction} rank {self.peer} broke: {_brief(error)}")
        lost.__cause__ = error.with_traceback(None)
        return lost

    def _open_lanes(self, sock: socket.socket) -> None:
        broken: Exception | None = None
        try:
            sock.settimeout(OPEN_TIMEOUT_S)
            groups = self._means.open_groups(self.peer, sock)
            sock.setblocking(False)
        except Exception as error:  # torch's own, or the socket's
            broken = error.with_traceback(None)
        with self._progress.lock, self._progress.guard:
            if self._opening is not sock:  # it all ended meanwhile
                sock.close()
                return
            self._opening = None
            if broken is not None:
                sock.close()
                why = _brief(broken)
                lost = PeerLost(f"no payload path to rank {self.peer} could be opened: {why}")
                lost.__cause__ = broken
                self._owner.on_end(self, lost)
            else:
                for lane, group in zip((self.outgoing, self.incoming), groups, strict=True):
                    lane.start(group)
                super().attach(sock)
            self._progress.wake()  # messages may have left, or failed, for which others wait


class OffStreamTransport(UnixTransport):
    """Frames over Unix streams or TCP; payloads by what a subclass opens between two ranks."""

    carrier: ClassVar[type[Carrier]] = OffStreamConnection
    sums: ClassVar[bool] = True  # whether a payload can be summed where it lies

    @property
    def closing(self) -> bool:
        """Whether this rank has said goodbye to all others."""
        return self._farewell is not None

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


def _brief(error: Exception) -> str:
    """Return an error's first sentence, without the line of somebody's source before it."""
    return re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]
