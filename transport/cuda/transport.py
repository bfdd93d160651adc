"""GPU to GPU within a host: the payload is copied once, to where its receiver uses it.

    rank 0                                                   rank 1
    isend:  an event of the current stream,
            a copy behind it, on `sends`, to a block
            of rank 1's GPU memory; "written" recorded
            frame "lent", word = the block and its slot ──>  tensors over the block
                                                             wait: the current stream waits for
                                                                   "written"
                                                             freed: "read" recorded, block free

All of it is given to the streams and nothing is waited for, so a message costs what its frame
costs. Everything else is as in shm/transport.py: frames, matching, order and death over the pair's
Unix stream; CPU messages in shared memory. What cannot go this way is staged
(sockets/gpu_stager.py): the first message of a pair, for which its receiver gets the memory ready;
what finds no free block; a pair on two hosts, or in two containers, or on two GPUs of which one
cannot reach the other.

How blocks are lent is in ipc_sender.py. Not yet run on hardware.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import ClassVar, Final

import torch

from transport.cuda import driver
from transport.cuda.ipc_receiver import GpuBorrowedMemory
from transport.cuda.ipc_sender import TABLE_NBYTES, GpuLendingArena
from transport.device import Event, gate
from transport.errors import PeerLost, ProtocolError
from transport.message.mailbox import Arrival
from transport.message.specs import MessageSpec
from transport.message.work import Send
from transport.shm.arena import BorrowedMemory, LendingArena
from transport.shm.transport import LendingConnection, ShmTransport
from transport.sockets.connection import Connection
from transport.sockets.gpu_stager import Stager
from transport.wire.format import Frame, FrameKind

_CREDENTIALS: Final = struct.Struct("3i")  # unix(7): pid, uid, gid of the peer


class Written:
    """What a sender's stream waits for before a sent tensor may be written; see `work.Ready`."""

    def __init__(self, stager: Stager, work: Send, event: Event) -> None:
        self._stager, self._doing, self._event = stager, work.description, event

    def wait(self) -> None:
        """Let the calling thread's current stream come after the copy."""
        with gate(self._stager.rank, self._doing):
            self._event.wait(self._stager.gpu.current())


class IpcConnection(LendingConnection):
    """A stream whose ends lend each other memory of their GPUs, too."""

    _ended: GpuLendingArena | None = None  # what may still be writing after the stream's end

    @property
    def settled(self) -> bool:
        """Whether all that was lent is written: who closes waits for that, also if the peer left.

        (The peer has all frames, and the goodbye; it hangs up then. Its GPU waits for the copies.)
        """
        lender = self.lender or self._ended
        return not isinstance(lender, GpuLendingArena) or lender.finished()

    def close_socket(self) -> None:
        """Close the socket; what was received stays, it lies in memory of this rank."""
        lender = self.lender
        super().close_socket()
        if isinstance(lender, GpuLendingArena):
            self._ended = None if lender.finished() else lender
            lender.end()

    def join(self) -> None:
        """Wait for the threads of a connection that has ended, and let go of what it lent."""
        super().join()
        self._ended = None

    def send(self, spec: MessageSpec, tensors: Sequence[torch.Tensor], work: Send) -> None:
        """Send a message's frame, and give the GPU its payload to copy if there is a way."""
        lender, stager, word = self.lender, self.stager, None
        if not spec.on_gpu or stager is None or not isinstance(lender, GpuLendingArena):
            super().send(spec, tensors, work)
            return
        limits = self._limits
        if 0 < spec.nbytes <= limits.payload_nbytes and len(spec.packed.data) <= limits.meta_nbytes:
            with gate(stager.rank, f"sending {spec} to rank {self.peer}"):
                word = lender.lend(spec, tensors)
        if word is None or lender.last is None:
            super().send(spec, tensors, work)
            return
        self.queue(FrameKind.LENT, spec.packed, spec.nbytes, tag=work.tag, word=word)
        work.ready = Written(stager, work, lender.last)
        work.complete()

    def _locate(self, frame: Frame, arrival: Arrival) -> None:
        """Take from a message's frame where the payload lies."""
        if frame.kind is not FrameKind.LENT or not arrival.spec.on_gpu:
            super()._locate(frame, arrival)
            return
        if self.stager is None or not isinstance(self.borrowed, GpuBorrowedMemory):
            raise ProtocolError(f"rank {self.peer} writes to a GPU that was not shown to it")
        with gate(self.stager.rank, f"receiving {arrival.spec} from rank {self.peer}"):
            try:
                arrival.tensors, arrival.loan = self.borrowed.take_message(frame.word, arrival.spec)
            except PeerLost as error:
                raise PeerLost(f"rank {self.peer} is lost: {error}") from error

    def _received(self, arrival: Arrival) -> None:
        """Complete the message; get memory ready for the next one if this was staged."""
        super()._received(arrival)
        if (
            arrival.spec.on_gpu
            and arrival.loan is None
            and isinstance(self.borrowed, GpuBorrowedMemory)
        ):
            self.borrowed.show()

    def _new_lender(self) -> LendingArena:
        if self.stager is None:
            return LendingArena(reserved_nbytes=TABLE_NBYTES)
        return GpuLendingArena(self.stager.gpu)

    def _new_borrowed(self, fd: int) -> BorrowedMemory:
        if self.stager is None or self.socket is None:
            return super()._new_borrowed(fd)
        told = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return GpuBorrowedMemory(fd, self.stager.gpu, _CREDENTIALS.unpack(told)[0])


class CudaIpcTransport(ShmTransport):
    """Ranks of one host write into memory of each other's GPUs; all else as over shm."""

    name: ClassVar[str] = "cuda_ipc"
    connection_class: ClassVar[type[Connection]] = IpcConnection

    @staticmethod
    def viable() -> str | None:
        """Return why this machine cannot share GPU memory, None when it can.

        It looks for GPUs by NVML, as torch.cuda.device_count does where it can. Where it cannot,
        CUDA is initialised, so a process that forks ranks must not ask.
        """
        if torch.version.cuda is None:
            return "torch was built without CUDA"
        if not torch.cuda.device_count():
            return "this machine has no CUDA device that torch can use"
        return driver.why_not() or ShmTransport.viable()
