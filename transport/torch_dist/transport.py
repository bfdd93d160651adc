"""Payloads over torch.distributed's point-to-point: gloo between CPUs, NCCL between GPUs.

What a lane of off_stream.py moves over is a process group of two ranks, of which one only sends and
the other only receives, always with tag 0. So the n-th send meets the n-th receive, and that is all
that NCCL promises: it has no tags, and pairs the calls on a communicator in their order. Tags,
dtypes and shapes are in our own frames. gloo has tags and is used without them, so that what is
tested with gloo holds for NCCL.

No store of torch's and no default group is made. What two ranks must tell each other to make a
group (an address for gloo, an id for NCCL) they say over their own authenticated connection, before
its first frame. gloo listens on ports of its own, which authenticate nobody: see README.md.

No other file of the runtime imports torch.distributed, and this one only who asks for it by name.
"""

from __future__ import annotations

import abc
import datetime
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.distributed as dist

from transport.cuda.device import Cuda, local_gpu, within
from transport.device import Gpu
from transport.errors import ProtocolError, TransportClosed, TransportError
from transport.message.specs import MessageSpec
from transport.private_names import gloo_options, nccl_options
from transport.sockets.addresses import Address, local_host
from transport.sockets.copy_thread import Group
from transport.sockets.transport import UnixTransport
from transport.torch_dist.off_stream import OPEN_TIMEOUT_S, OffStreamTransport
from transport.wire.decoder import Decoder
from transport.wire.format import HEADER, Frame, FrameKind, Limits, encode

if TYPE_CHECKING:
    Store = object
else:
    Store = getattr(dist, "Store", object)  # (torch can be built without all of it)

SENDER: Final = 0  # who is who in a group
RECEIVER: Final = 1
TAG: Final = 0
FOREVER: Final = datetime.timedelta(days=365)  # whoever waits for the lane has the limit
MAX_NOTES: Final = 64  # of a pair; gloo takes four, NCCL two
_NO_KEY: Final = ""  # of the last note


class PairStore(Store):
    """A store whose values two ranks tell each other over a blocking socket, until it is closed.

    torch calls back to it while it makes a group; what is raised here comes out there.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock: socket.socket | None = sock
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:  # what torch gives
        """Keep the value, and tell it."""
        self._values[key] = bytes(value)
        if self._sock is not None:
            tell(self._sock, key, bytes(value))

    def get(self, key: str) -> bytes:
        """Return a value; block until it is there."""
        while key not in self._values:
            if self._sock is None:
                raise RuntimeError(f"nobody tells {key!r} any more: the group was made")
            if len(self._values) >= MAX_NOTES:
                raise ProtocolError(f"{MAX_NOTES} notes, and {key!r} is not among them")
            told, value = hear(self._sock)
            self._values[told] = value
        return self._values[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Block until all keys are there; the limit is the socket's."""
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return all(key in self._values for key in keys)

    def clone(self) -> PairStore:
        """Return the store itself: one thread at a time uses it."""
        return self

    def close(self) -> None:
        """Tell nothing more, and read the other's notes to the end: frames may follow them."""
        if self._sock is not None:
            tell(self._sock, _NO_KEY, b"")
            self.get(_NO_KEY)
            self._sock = None


class TorchDistTransport(OffStreamTransport):
    """What gloo and NCCL have in common; a subclass makes a group of two."""

    @abc.abstractmethod
    def _make_group(self, store: PairStore, prefix: str, at: str, *, sends: bool) -> Group:
        """Make the group of a sender and a receiver; blocks until the other side does it too.

        `at` is this host's address, as the peer sees it.
        """

    def open_groups(self, peer: int, sock: socket.socket) -> tuple[Group, Group]:
        """Make both groups, with a store between the two ranks that ends with that."""
        store = PairStore(sock)
        at = "127.0.0.1" if sock.family == socket.AF_UNIX else local_host(sock)
        groups = {
            src: self._make_group(store, f"from {src}", at, sends=src == self.rank)
            for src in sorted((self.rank, peer))  # both sides in the same order
        }
        store.close()
        return groups[self.rank], groups[peer]


class GlooGroup:
    """Two ranks over gloo."""

    def __init__(self, store: PairStore, prefix: str, device: Any, *, sends: bool) -> None:
        torch_dist: Any = dist
        gloo = torch_dist.ProcessGroupGloo
        limit = datetime.timedelta(seconds=OPEN_TIMEOUT_S)
        options = gloo_options(gloo, device, threads=1, timeout=limit)  # send and recv need none
        me = SENDER if sends else RECEIVER
        self._group = gloo(torch_dist.PrefixStore(prefix, store), me, 2, options)
        self._store = store  # torch keeps its own half of the object alive, not Python's
        self._sends = sends

    def move(self, tensor: torch.Tensor, ready: object) -> None:
        """Send the tensor's bytes or receive into them, and wait for it."""
        if self._sends:
            self._group.send([tensor], RECEIVER, TAG).wait(FOREVER)
        else:
            self._group.recv([tensor], SENDER, TAG).wait(FOREVER)

    def abort(self) -> None:
        """Do nothing: gloo has no way to end a wait.

        One whose transfer has not begun ends when the other side lets go of its group. One that is
        in the midst of it ends with the transfer, and never if the other side has died (torch
        2.13). A wait that runs out of time wakes nobody then, and breaks the transfer besides.
        """


class GlooTransport(TorchDistTransport):
    """Every payload of a byte or more over gloo."""

    name: ClassVar[str] = "gloo"

    def __init__(self, *args: Any, **more: Any) -> None:
        # One listening port and one thread of gloo's for each address where peers reach this rank.
        self.devices: dict[str, Any] | None = {}
        self._making = threading.Lock()
        super().__init__(*args, **more)

    @staticmethod
    def viable() -> str | None:
        """Return why this machine cannot use gloo, None when it can."""
        if not dist.is_available() or not dist.is_gloo_available():
            return "torch was built without gloo"
        return UnixTransport.viable()

    def abort(self, error: TransportError) -> None:
        """End as every transport does, and let go of gloo's ports."""
        super().abort(error)
        with self._making:
            self.devices = None

    def _make_group(self, store: PairStore, prefix: str, at: str, *, sends: bool) -> Group:
        with self._making:
            if self.devices is None:
                raise TransportClosed("this rank has ended meanwhile")
            make = dist.ProcessGroupGloo.create_device
            device = self.devices[at] = self.devices.get(at) or make(hostname=at)
        return GlooGroup(store, prefix, device, sends=sends)

    def goes_apart(self, spec: MessageSpec, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether there is a payload at all that gloo can take from where it is."""
        return spec.nbytes > 0 and not spec.on_gpu


class NcclGroup:
    """Two ranks' GPUs over NCCL: a communicator and a stream of this direction's own."""

    def __init__(self, store: PairStore, prefix: str, device: torch.device, *, sends: bool) -> None:
        torch_dist: Any = dist
        nccl = torch_dist.ProcessGroupNCCL
        options = nccl_options(nccl, FOREVER)
        me = SENDER if sends else RECEIVER
        self._group = nccl(torch_dist.PrefixStore(prefix, store), me, 2, options)
        self._store = store
        self._sends = sends
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # NCCL makes its communicator at the first call, with the help of the store.
        self.move(torch.zeros(1, device=device), _recorded(device))

    def move(self, tensor: torch.Tensor, ready: object) -> None:
        """Send the tensor's bytes or receive into them after the event `ready`; wait for it."""
        assert isinstance(ready, torch.cuda.Event)
        flat = [tensor.view(-1).view(torch.uint8)]  # (NCCL does not know all dtypes)
        with within(self._stream):
            self._stream.wait_event(ready)
            if self._sends:
                self._group.send(flat, RECEIVER, TAG).wait()
            else:
                self._group.recv(flat, SENDER, TAG).wait()
        self._stream.synchronize()

    def abort(self) -> None:
        """Let the kernels that wait for the other side end."""
        self._group.abort()


class NcclTransport(TorchDistTransport):
    """CUDA tensors over NCCL, one GPU a rank; others on the stream. Not yet run on hardware."""

    name: ClassVar[str] = "nccl"
    sums: ClassVar[bool] = False

    def __init__(
        self,
        rank: int,
        world_size: int,
        addresses: Mapping[int, Address],
        *args: Any,
        gpu: Gpu | None = None,
        **more: Any,
    ) -> None:
        index = local_gpu(rank, addresses, torch.cuda.device_count())
        gpu = gpu or Cuda(torch.device("cuda", index))
        super().__init__(rank, world_size, addresses, *args, gpu=gpu, **more)

    @staticmethod
    def viable() -> str | None:
        """Return why this machine cannot use NCCL, None when it can."""
        if not dist.is_available() or not dist.is_nccl_available():
            return "torch was built without CUDA, or without NCCL"
        if not torch.cuda.is_available():
            return "this machine has no CUDA device that torch can use"
        return UnixTransport.viable()

    def _make_group(self, store: PairStore, prefix: str, at: str, *, sends: bool) -> Group:
        return NcclGroup(store, prefix, self.device, sends=sends)

    def goes_apart(self, spec: MessageSpec, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether all of it is on this rank's GPU; one of both kinds is staged (gpu_stager.py)."""
        return all(each.on_gpu for each in spec.tensors) and spec.nbytes > 0

    def ready(self) -> object:
        """Return an event of what this thread has given its GPU to do."""
        return _recorded(self.device)

    def room(self, spec: MessageSpec) -> Sequence[torch.Tensor]:
        """Return memory of this rank's GPU, whatever the receive has."""
        return spec.allocate(self.device)


def _recorded(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


# Notes that two ranks pass each other over a new connection, before its first frame: records of the
# wire format, which checks what a library that does not look twice will read.

NOTE_LIMITS: Final = Limits(meta_nbytes=64 * 1024, payload_nbytes=0)


def tell(sock: socket.socket, key: str, value: bytes) -> None:
    """Send a note over a blocking socket."""
    sock.sendall(encode(FrameKind.RECORD, 0, [key, value]))


def hear(sock: socket.socket) -> tuple[str, bytes]:
    """Block until a note has come, and read not a byte more: frames may follow.

    Raises:
        ProtocolError: it is no note, or bytes of it changed on the way.
        OSError: the other side has hung up, or the socket's time is over.
    """
    decoder, header = Decoder(NOTE_LIMITS), _exactly(sock, HEADER.size)
    events = decoder.feed(header)
    events += decoder.feed(_exactly(sock, HEADER.unpack(header)[2]))
    match events:
        case [Frame(kind=FrameKind.RECORD, meta=[str(key), bytes(value)]), _]:
            return key, value
        case other:
            raise ProtocolError(f"not a key and a value: {other!r:.200}")


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        part = sock.recv(nbytes - len(data))
        if not part:
            raise ConnectionResetError("it has hung up")
        data += part
    return bytes(data)
