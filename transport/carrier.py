"""A connection that carries messages: which frame each becomes, and what it says of the payload."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from transport.addresses import LARGE_NBYTES, tune_for
from transport.connection import Connection, Owner
from transport.errors import ProtocolError, TransportError
from transport.mailbox import Arrival
from transport.progress import Progress
from transport.staging import Stager
from transport.tensors import MessageSpec, payload_sum
from transport.wire import Frame, FrameKind, Limits
from transport.work import Send


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
        """Whether nothing is at work any more for what has left; see cuda_ipc.py."""
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
