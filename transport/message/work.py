"""A send or a receive on its way (`Work`), and the counts that prove a hang (`Traffic`).

1. A work is done once, with a result or an error, by the transport under its lock.
2. `wait` raises a copy of the error each time, so that two threads never share a traceback.
3. While a thread waits without a limit, `Traffic.waits` says for what. When no message is on its
   way and every rank waits for another one, the job hangs for certain.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar, Protocol

from transport.errors import JobFailed, TransportError, WaitTimeout, fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from transport.device import Event, Gpu
    from transport.message.specs import Message, MessageSpec


class Ready(Protocol):
    """What a GPU has still to do before a complete message can be used."""

    def wait(self) -> None:
        """Let what the calling thread gives to its GPU from now on come after that."""


class Waiting(Protocol):
    """What a wait needs of its transport; `transport.Transport` is one."""

    traffic: Traffic

    def progress_until(self, work: Work, timeout: float | None) -> bool:
        """Block until `work.done`; False when time ran out."""


class Work:
    """Something on its way. `wait` ends when it is complete or has failed."""

    __slots__ = ("_error", "_result", "_transport", "done", "peer", "ready", "tag")
    doing: ClassVar[str]  # what it is, in words
    is_receive = False

    def __init__(self, transport: Waiting, peer: int, tag: int) -> None:
        self._transport = transport
        self.peer = peer
        self.tag = tag
        self._result: Message | None = None
        self._error: TransportError | None = None
        self.ready: Ready | None = None  # stream order (rule 9), for each thread that waits
        self.done = False

    @property
    def description(self) -> str:
        """What it is, in words: "sending to rank 1 with tag 0"."""
        return self.doing.format(peer=self.peer, tag=self.tag)

    def is_completed(self) -> bool:
        """Whether `wait` would return, or raise, without blocking."""
        return self.done

    def wait(self, timeout: float | None = None) -> Message | None:
        """Block until the work is complete; return the received message, None for a send.

        A send is complete when its tensor may be written again, not when the peer has received
        it. `timeout` is in seconds, None waits without a limit.

        Raises:
            WaitTimeout: the seconds are over; the work goes on and can be waited for again.
            MessageMismatch: what arrived is not what the receive had stated.
            PeerLeft, PeerLost, ProtocolError: the peer cannot complete it any more.
            JobFailed: some rank of the job failed.
            TransportClosed: this rank closed or aborted its transport.
            InternalError: the transport itself broke.
            DeviceError: this rank's GPU did.
        """
        if not self.done:
            waits, me = self._transport.traffic.waits, threading.get_ident()
            waits[me] = self if timeout is None else None
            try:
                in_time = self._transport.progress_until(self, timeout)
            finally:
                del waits[me]
            if not in_time:
                raise WaitTimeout(f"nothing after {timeout} s of {self.description}")
        if self._error is not None:
            error = fresh(self._error)
            if isinstance(error, JobFailed):
                error.doing = error.doing or self.description
            raise error
        if self.ready is not None:
            self.ready.wait()
        return self._result

    def complete(self, result: Message | None = None) -> None:
        """Mark the work as done; called by the transport under its lock."""
        self._result = result
        self.done = True

    def fail(self, error: TransportError) -> None:
        """Mark the work as failed; called by the transport under its lock."""
        self._error = error
        self.done = True


class Send(Work):
    """A message on its way out."""

    __slots__ = ()
    doing = "sending to rank {peer} with tag {tag}"


class Receive(Work):
    """A posted receive: the work, and what its receiver has stated about the message.

    `targets` are the tensors of `into` if bytes can be put there from a socket: none where that is
    None, or where a part of it is on a GPU; the GPU is then to fill it after the event `after`.
    """

    __slots__ = ("after", "expected", "into", "targets")
    doing = "waiting for a message from rank {peer} with tag {tag}"
    is_receive = True

    def __init__(
        self,
        transport: Waiting,
        src: int,
        tag: int,
        into: Message | None,
        expected: MessageSpec | None,
    ) -> None:
        super().__init__(transport, src, tag)
        self.into = into
        self.targets: Sequence[torch.Tensor] = ()
        if into is not None:
            self.targets = into if isinstance(into, tuple) else (into,)
        self.after: Event | None = None
        self.expected = expected

    def reserve(self, gpu: Gpu) -> None:
        """Take note of parts of `into` that are on a GPU, and of what it was given so far."""
        if any(gpu.holds(tensor) for tensor in self.targets):
            self.after, self.targets = gpu.now(), ()


class Traffic:
    """What one rank has sent, received and waits for: enough to prove that nothing moves any more.

    Attributes:
        sent: messages handed to the transport, by receiver.
        received: messages whose last byte is here, by sender, asked for or not.
        sent_nbytes, received_nbytes: the payloads of all of these, whichever way they travelled.
        waits: for each thread inside a wait the work that it waits for; None where the wait has a
            limit, so that it will go on by itself.
    """

    def __init__(self) -> None:
        self.sent: defaultdict[int, int] = defaultdict(int)
        self.received: defaultdict[int, int] = defaultdict(int)
        self.sent_nbytes = 0
        self.received_nbytes = 0
        self.waits: dict[int, Work | None] = {}


def deadline_after(timeout: float | None) -> float | None:
    """Return the `time.monotonic()` at which `timeout` seconds are over; None for no limit."""
    return None if timeout is None else time.monotonic() + timeout


def remaining(deadline: float | None) -> float | None:
    """Return the seconds left until `deadline`, not below 0; None for no limit."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
