"""What a transport needs of a GPU (`Gpu`), and the GPU that CUDA gives (`Cuda`).

A transport without a `Gpu` moves CPU tensors alone and never comes here. Tests put a fake in its
place: memory and events that are shared between processes, and streams whose copies come late.

1. Copies run on two streams of the transport's own, `sends` and `receives`, never on the caller's.
   Events order them with the caller's work (rule 9 of the contract). A third one, `returns`, copies
   nothing: it comes after all that reads a peer's message, so that this is one event for the peer.
2. No method waits for the GPU. Only a thread that is made for that may call `Event.synchronize`.
3. Every call may be the one that tells of an earlier error of the device, as a RuntimeError; who
   calls wraps it in `gate`, which says whose GPU it was and what was being done.

`Cuda` has not yet run on hardware.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from transport.cuda import driver
from transport.cuda.dlpack import DeviceType, tensor_at
from transport.device import CPU, Copy, Event, Form, Memory, Stream
from transport.errors import UnknownTransport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transport.sockets.addresses import Address


class Cuda:
    """A GPU over CUDA. To make one initialises CUDA: never in a process that forks ranks later.

    `on_copy`, where it is set, is told of every copy, with two events around it that measure time.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.sends: Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.receives: Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.returns: Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.on_copy: Callable[[Copy], None] | None = None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is this GPU's."""
        return tensor.device == self.device

    def current(self) -> Stream:
        """Return the calling thread's current stream."""
        return torch.cuda.current_stream(self.device)

    def now(self) -> Event:
        """Return an event of all that the calling thread's current stream was given."""
        return self.mark(self.current())

    def mark(self, stream: Stream) -> Event:
        """Return an event of all that a stream was given."""
        # (A thread that waits for it sleeps, rather than look again and again.)
        event: Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def fresh(self, spec: Form) -> torch.Tensor:
        """Return new memory of this GPU, for `receives` to write first."""
        with within(self.receives):
            return spec.allocate(self.device)

    def pinned(self, spec: Form) -> torch.Tensor:
        """Return page-locked memory; torch uses it again once the copies from and to it are over.

        (CUDA Programming Guide, "Page-Locked Host Memory": only with that do copies overlap.)
        """
        with torch.inference_mode(mode=False):
            return torch.empty(spec.shape, dtype=spec.dtype, device=CPU, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Give a stream the copy of one contiguous tensor over another of the same spec."""
        with within(stream), torch.inference_mode(), self._measured(stream, target):
            target.copy_(source, non_blocking=True)

    def used(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Keep the memory of a tensor, when it is freed, until the stream has come so far."""
        if tensor.device.type == "cuda":
            tensor.record_stream(stream)

    def share(self, nbytes: int) -> Memory:
        """Return new memory of this GPU that other processes can open by its handle."""
        return driver.allocate(self.device.index, nbytes)

    def open(self, handle: bytes, nbytes: int) -> Memory:
        """Return a peer's memory that this GPU can write to; RuntimeError: it cannot."""
        return driver.open_memory(self.device.index, handle)

    def write(self, address: int, tensor: torch.Tensor, stream: Stream) -> None:
        """Give a stream the copy of a contiguous tensor of this GPU to an address."""
        with self._measured(stream, tensor):
            source, nbytes = tensor.data_ptr(), tensor.nbytes
            driver.copy(self.device.index, address, source, nbytes, stream.cuda_stream)

    def over(self, address: int, spec: Form, release: Callable[[], None]) -> torch.Tensor:
        """Return a tensor over memory of this GPU; `release` is called when that is freed."""
        at = (DeviceType.CUDA, self.device.index)
        with torch.inference_mode(mode=False), torch.enable_grad():
            flat = tensor_at(address, spec.nbytes, at, release)
            return flat.view(spec.dtype).view(spec.shape).detach()

    def share_event(self) -> tuple[Event, bytes]:
        """Return an event that other processes can open, and its handle."""
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(interprocess=True, blocking=True)  # type: ignore[no-untyped-call]
            handle: bytes = event.ipc_handle()  # type: ignore[no-untyped-call]
        _events[handle] = event
        return event, handle

    def open_event(self, handle: bytes) -> Event:
        """Return a peer's event; RuntimeError: it cannot be opened here."""
        mine = _events.get(handle)  # (CUDA refuses to open what this very process has made)
        opened: Event = mine or torch.cuda.Event.from_ipc_handle(self.device, handle)  # type: ignore[no-untyped-call]
        return opened

    @contextlib.contextmanager
    def _measured(self, stream: Stream, moved: torch.Tensor) -> Iterator[None]:
        if self.on_copy is None:
            yield
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record(stream)
        yield
        ended.record(stream)
        direction = "send" if stream is self.sends else "receive"
        self.on_copy(Copy(direction, moved.nbytes, began, ended))


@contextlib.contextmanager
def within(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make a stream the current one, in a thread that may never have chosen a device.

    (Such a thread's device is 0. torch.cuda.stream alone sets that again at its end, and since CUDA
    12 cudaSetDevice makes a context there: some hundred MiB of a GPU that may be another rank's.)
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


_events: Final[weakref.WeakValueDictionary[bytes, Any]] = weakref.WeakValueDictionary()


def local_gpu(rank: int, addresses: Mapping[int, Address], num_gpus: int) -> int:
    """Return which GPU of its host a rank uses: the n-th of a host's ranks has the n-th.

    Raises:
        UnknownTransport: the host has more ranks than GPUs, which NCCL does not allow.
    """
    host = addresses[rank].host
    neighbours = sorted(other for other, address in addresses.items() if address.host == host)
    if len(neighbours) > num_gpus:
        raise UnknownTransport(
            f"nccl needs one GPU a rank: this host has {len(neighbours)} ranks and {num_gpus} GPUs"
        )
    return neighbours.index(rank)
