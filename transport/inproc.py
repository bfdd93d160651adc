"""The transport for ranks that are threads of one process: for tests, and for reading first.

    rank 0                             hub                          rank 1
    isend(tensor, dst=1) ── copy ──> mailbox of rank 1 <── posted ── irecv(src=0)
    wait: returns at once                └── the receive is complete ──> wait: the copy

1. The hub has one lock, and one mailbox for each rank. Every call runs under the lock, in the
   caller's own thread; there is no other thread.
2. `isend` copies the tensor into memory that the receiver's mailbox names. So the send is complete
   at once, and the two sides never share memory.
3. A rank that waits sleeps until the call of another rank completes its work.
4. There is no stream that could be left unread, so the bound on memory (rule 5 of base.py) does not
   hold here.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar

from transport.base import Transport
from transport.errors import (
    InvalidArgument,
    JobFailed,
    PeerLeft,
    PeerLost,
    TransportClosed,
    TransportError,
    fresh,
)
from transport.message.mailbox import Arrival, Mailbox
from transport.message.specs import Message, MessageSpec
from transport.message.tensors import overwrite, prepare
from transport.message.work import Receive, Send, Work, deadline_after, remaining

if TYPE_CHECKING:
    from transport.device import Gpu


class InprocHub:
    """What the ranks of one in-process world share; make one, then one `InprocTransport` a rank."""

    def __init__(self, world_size: int) -> None:
        if world_size < 1:
            raise InvalidArgument(f"a world has at least one rank, not {world_size}")
        self.world_size = world_size
        self.changed = threading.Condition()
        self.ranks: dict[int, InprocTransport] = {}
        self.gone: dict[int, TransportError] = {}  # why a rank will send no more

    def transports(self) -> list[InprocTransport]:
        """Return the transports of all ranks, in rank order."""
        return [InprocTransport(self, rank) for rank in range(self.world_size)]


class InprocTransport(Transport):
    """One rank of an `InprocHub`."""

    name: ClassVar[str] = "inproc"

    def __init__(self, hub: InprocHub, rank: int, *, gpu: Gpu | None = None) -> None:
        super().__init__(rank, hub.world_size, gpu)
        self._hub = hub
        self._mailbox = Mailbox()
        if gpu is not None:
            from transport.message.gpu_mailbox import GpuMailbox

            self._mailbox = GpuMailbox(rank, gpu, MessageSpec.allocate)
        self._ended: TransportError | None = None  # what every later call raises
        with hub.changed:
            if not 0 <= rank < hub.world_size or rank in hub.ranks:
                raise InvalidArgument(f"rank {rank} does not exist or is taken in this hub")
            hub.ranks[rank] = self

    def post_send(self, message: Message, dst: int, tag: int) -> Work:
        """Copy the message into the receiver's mailbox; the work is complete at once."""
        spec, tensors = prepare(message, self.gpu)
        work = Send(self, dst, tag)
        with self._hub.changed:
            self._raise_if_ended()
            if dst in self._hub.gone:
                raise fresh(self._hub.gone[dst])
            peer = self._hub.ranks.get(dst)
            if peer is None:
                raise InvalidArgument(f"rank {dst} has not joined this hub yet")
            arrival = Arrival(self.rank, tag, spec)
            if self.gpu is not None and spec.on_gpu:
                from transport.device import gate
                from transport.message.gpu_mailbox import Handed

                with gate(self.rank, work.description):
                    handed = Handed(self.gpu, peer.gpu, spec, tensors)
                arrival.tensors, arrival.loan, work.ready = handed.tensors, handed, handed
                peer._mailbox.arrive(arrival)
            else:
                peer._mailbox.arrive(arrival)
                for target, tensor in zip(arrival.tensors, tensors, strict=True):
                    overwrite(target, tensor)
            peer._mailbox.complete(arrival)
            self.traffic.sent[dst] += 1
            peer.traffic.received[self.rank] += 1
            self.traffic.sent_nbytes += spec.nbytes
            peer.traffic.received_nbytes += spec.nbytes
            self._hub.changed.notify_all()
        work.complete()
        return work

    def post_receive(self, receive: Receive) -> None:
        """Post a receive; it fails at once when its source is gone and has left nothing for it."""
        with self._hub.changed:
            self._raise_if_ended()
            self._mailbox.post(receive)
            if not receive.done and receive.peer in self._hub.gone:
                self._mailbox.fail(self._hub.gone[receive.peer], receive.peer)

    def withdraw(self, receive: Receive) -> bool:
        """Take a posted receive back; False when it is done already."""
        with self._hub.changed:
            return self._mailbox.withdraw(receive, None)

    def progress_until(self, work: Work, timeout: float | None) -> bool:
        """Sleep until another rank's call has completed the work."""
        deadline = deadline_after(timeout)
        with self._hub.changed:
            while not work.done:
                left = remaining(deadline)
                if left == 0.0:
                    return False
                self._hub.changed.wait(left)
        return True

    def close(self, timeout: float | None = None) -> None:
        """Say goodbye to every rank; there is nothing to flush, sends are complete at once."""
        goodbye = PeerLeft(f"rank {self.rank} has left, so nothing more comes from it")
        self._end(TransportClosed("this rank has closed its transport"), goodbye)

    def abort(self, error: TransportError) -> None:
        """End at once; peers see the loss of this rank, or the cause where it is known."""
        lost = PeerLost(f"rank {self.rank} ended without a goodbye: {error}")
        self._end(error, error if isinstance(error, JobFailed) else lost)

    def _end(self, mine: TransportError, theirs: TransportError) -> None:
        with self._hub.changed:
            if self._ended is not None:
                return
            self._ended = mine
            self._hub.gone[self.rank] = theirs
            self._mailbox.fail(mine)
            for peer in self._hub.ranks.values():
                peer._mailbox.fail(theirs, self.rank)
            self._hub.changed.notify_all()

    def _raise_if_ended(self) -> None:
        if self._ended is not None:
            raise fresh(self._ended)
