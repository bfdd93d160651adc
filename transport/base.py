"""The contract that every transport keeps, and that the contract tests check on each of them.

1. Order. Messages from one rank to another with the same tag arrive in the order in which they
   were sent. Between different tags there is no order, and none is needed.
2. Matching. A receive names its source and its tag; the first message that fits completes it. It
   may be posted before or after the message arrives.
3. No wait for the peer. `isend` returns without waiting until the other side receives, or even
   exists: what the connection does not take yet is queued by reference.
4. Ownership. From `isend` until its work is complete the tensor belongs to the transport: it may
   be read, not written. Afterwards no change to it reaches the receiver. A received tensor is the
   receiver's alone.
5. Bounded memory. Messages that no receive has asked for are held up to `unexpected_limit` bytes
   per peer. Beyond it the rank stops reading from that peer, except while one of its threads waits:
   to stop then could deadlock.
6. Threads. Every method may be called from any thread.
7. Failure. After `abort(error)`, and after a peer is lost, every call that depends on it raises;
   none blocks for ever. A call that timed out has changed nothing: a thread can wait for its work
   again.
8. End. `close` sends what is queued, says goodbye to every peer, then ends. `abort` ends at once.
9. Stream order. On a GPU "now" is a place in a stream: the current stream of the calling thread.
   A GPU tensor is sent as it is when the stream has run all that it was given before `isend`;
   `into` is filled after all that the stream was given before `irecv`. Work that is given to the
   current stream after `wait` returns may use a received tensor and write a sent one. No call waits
   for the device, and none copies on the caller's stream.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from transport.errors import (
    InvalidArgument,
    JobFailed,
    MessageMismatch,
    TransportError,
    WaitTimeout,
)
from transport.message.specs import Message, MessageSpec, TensorSpec
from transport.message.tensors import fillable
from transport.message.work import Receive, Traffic, Work

if TYPE_CHECKING:
    from transport.device import Gpu

TAG_LIMIT = 2**62  # user tags are 0 ... TAG_LIMIT - 1; the negative ones belong to the transport
DEFAULT_UNEXPECTED_LIMIT = 64 * 1024 * 1024


class Transport(abc.ABC):
    """Point-to-point messages between the ranks of one world; the rules are at the file's top."""

    name: ClassVar[str]

    def __init__(self, rank: int, world_size: int, gpu: Gpu | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.gpu = gpu  # where this rank's GPU tensors are; None: it moves CPU tensors alone
        self.traffic = Traffic()

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors are: its GPU, or the CPU."""
        return torch.device("cpu") if self.gpu is None else self.gpu.device

    @staticmethod
    def viable() -> str | None:
        """Return None when this machine can use the transport, else the reason in one sentence."""
        return None

    def isend(self, message: Message, dst: int, tag: int = 0) -> Work:
        """Start to send a tensor (or a tuple of them) of any shape; never waits for the peer.

        It is a CPU tensor, or one of this rank's GPU where the transport was given that (`gpu`).

        A contiguous tensor is sent from its own memory: leave it as it is until the work is done.

        Raises:
            InvalidArgument: no such rank, this rank itself, a bad tag, or not a sendable tensor.
            JobFailed, PeerLeft, PeerLost, TransportClosed: the message cannot go anywhere.
        """
        self._check(dst, tag, "send to")
        try:
            return self.post_send(message, dst, tag)
        except JobFailed as error:
            error.doing = f"sending to rank {dst} with tag {tag}"
            raise

    def irecv(
        self,
        src: int,
        tag: int = 0,
        *,
        into: Message | None = None,
        expect: TensorSpec | MessageSpec | None = None,
    ) -> Work:
        """Start to receive the next message of `src` with `tag`; never waits for the peer.

        `into` is a contiguous tensor (or tuple), of the same kind, that the message is to fill; the
        message must then have its dtype and shape; `expect` states them without giving memory.

        Raises:
            InvalidArgument: no such rank, this rank itself, a bad tag, memory that cannot be
                filled, or `into` and `expect` that contradict each other.
            JobFailed, TransportClosed: nothing can be received any more.
        """
        self._check(src, tag, "receive from")
        expected = None
        if expect is not None:
            expected = MessageSpec((expect,), False) if isinstance(expect, TensorSpec) else expect
            if not isinstance(expected, MessageSpec):
                raise InvalidArgument(
                    f"`expect` is a TensorSpec or a MessageSpec, not {expect!r:.100}"
                )
        if into is not None:
            filled = fillable(into, self.gpu)
            if expected is not None and expected != filled:
                raise InvalidArgument(f"`into` is {filled}, `expect` says {expected}")
            expected = filled
        receive = Receive(self, src, tag, into, expected)
        if self.gpu is not None and into is not None:
            receive.reserve(self.gpu)
        try:
            self.post_receive(receive)
        except JobFailed as error:
            error.doing = receive.description
            raise
        return receive

    def send(
        self, message: Message, dst: int, tag: int = 0, *, timeout: float | None = None
    ) -> None:
        """Send and block until the tensor may be written again; raises what `Work.wait` raises."""
        self.isend(message, dst, tag).wait(timeout)

    def recv(
        self,
        src: int,
        tag: int = 0,
        *,
        into: torch.Tensor | None = None,
        expect: TensorSpec | None = None,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """Receive one tensor and block until it is here; raises what `Work.wait` raises.

        Raises:
            MessageMismatch: the message is a tuple of tensors; receive those with `irecv`.
        """
        message = self.receive(src, tag, into=into, expect=expect, timeout=timeout)
        if isinstance(message, tuple):
            raise MessageMismatch(
                f"the message from rank {src} (tag {tag}) is a tuple {MessageSpec.of(message)}, "
                "recv takes one tensor: use irecv(...).wait()"
            )
        return message

    def receive(
        self,
        src: int,
        tag: int = 0,
        *,
        into: Message | None = None,
        expect: TensorSpec | MessageSpec | None = None,
        timeout: float | None = None,
    ) -> Message:
        """Receive one message, a tensor or a tuple, and block until it is here.

        When the seconds are over the receive is taken back: the message goes to the next one that
        asks. (Only one that had begun to arrive still fills `into`, and then goes there too.)
        """
        work = self.irecv(src, tag, into=into, expect=expect)
        try:
            message = work.wait(timeout)
        except WaitTimeout:
            if self.withdraw(cast(Receive, work)):
                raise
            message = work.wait(0.0)  # it came at the last moment
        assert message is not None
        return message

    def _check(self, peer: int, tag: int, verb: str) -> None:
        if (
            type(peer) is int
            and 0 <= peer < self.world_size
            and peer != self.rank
            and type(tag) is int
            and -TAG_LIMIT <= tag < TAG_LIMIT
        ):
            return
        if type(peer) is not int or not 0 <= peer < self.world_size or peer == self.rank:
            why = "that is this rank itself" if peer == self.rank else "there is no such rank"
            raise InvalidArgument(
                f"rank {self.rank} of {self.world_size} cannot {verb} rank {peer!r}: {why}"
            )
        raise InvalidArgument(f"a tag is an integer from 0 to 2**62 - 1, not {tag!r}")

    @abc.abstractmethod
    def post_send(self, message: Message, dst: int, tag: int) -> Work:
        """Queue a checked message; see `isend`."""

    @abc.abstractmethod
    def post_receive(self, receive: Receive) -> None:
        """Post a checked receive; see `irecv`."""

    @abc.abstractmethod
    def withdraw(self, receive: Receive) -> bool:
        """Take a posted receive back; False when it is done already."""

    @abc.abstractmethod
    def progress_until(self, work: Work, timeout: float | None) -> bool:
        """Block until `work.done`, serving every peer meanwhile; False when time ran out."""

    @abc.abstractmethod
    def close(self, timeout: float | None = None) -> None:
        """Send what is queued, say goodbye to every peer and end; a second call does nothing.

        Raises:
            WaitTimeout: a peer did not take what is queued within `timeout` seconds; the
                transport is then aborted.
        """

    @abc.abstractmethod
    def abort(self, error: TransportError) -> None:
        """End now: every pending and later call raises `error`. The first error given stays."""
