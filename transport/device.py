"""What a transport needs of a GPU: tensors of it, streams, moments in them, shared memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, Protocol

import torch

from transport.errors import DeviceError

CPU: Final = torch.device("cpu")


Stream = Any  # what is given to one runs in that order; torch.cuda.Stream, and in tests a thread


class Form(Protocol):
    """What memory of a GPU is made for; `TensorSpec` is one."""

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @property
    def nbytes(self) -> int:
        """The tensor's size."""

    def allocate(self, device: torch.device = ...) -> torch.Tensor:
        """Return uninitialised memory of this form."""


class Memory(Protocol):
    """Memory of a GPU that processes share."""

    address: int
    handle: bytes

    def close(self) -> None:
        """Give it back, or let go of a peer's; nothing may use it any more."""


class Moment(Protocol):
    """A place in a stream, of which one can only come after it."""

    def wait(self, stream: Stream) -> None:
        """Let what the stream is given from now on come after this."""

    def synchronize(self) -> None:
        """Block the calling thread until the device has come here."""


class Event(Moment, Protocol):
    """A place in a stream; torch.cuda.Event is one."""

    def record(self, stream: Stream) -> None:
        """Become the place after all that the stream was given so far."""

    def query(self) -> bool:
        """Whether the device has come here."""


class Gpu(Protocol):
    """One rank's GPU, as its transport sees it."""

    device: torch.device
    sends: Stream
    receives: Stream
    returns: Stream

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is this GPU's."""

    def current(self) -> Stream:
        """Return the calling thread's current stream."""

    def now(self) -> Event:
        """Return an event of all that the calling thread's current stream was given."""

    def mark(self, stream: Stream) -> Event:
        """Return an event of all that a stream was given."""

    def fresh(self, spec: Form) -> torch.Tensor:
        """Return new memory of this GPU, for `receives` to write first."""

    def pinned(self, spec: Form) -> torch.Tensor:
        """Return new memory of the CPU that a copy can run beside the CPU's work from or to."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Give a stream the copy of one contiguous tensor over another of the same spec."""

    def used(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Keep the memory of a tensor, when it is freed, until the stream has come so far."""

    # What follows is for memory and events that processes of one host share (cuda/transport.py).

    def share(self, nbytes: int) -> Memory:
        """Return new memory of this GPU that other processes can open by its handle."""

    def open(self, handle: bytes, nbytes: int) -> Memory:
        """Return a peer's memory that this GPU can write to; RuntimeError: it cannot."""

    def write(self, address: int, tensor: torch.Tensor, stream: Stream) -> None:
        """Give a stream the copy of a contiguous tensor of this GPU to an address."""

    def over(self, address: int, spec: Form, release: Callable[[], None]) -> torch.Tensor:
        """Return a tensor over memory of this GPU; `release` is called when that is freed."""

    def share_event(self) -> tuple[Event, bytes]:
        """Return an event that other processes can open, and its handle."""

    def open_event(self, handle: bytes) -> Event:
        """Return a peer's event; RuntimeError: it cannot be opened here."""


class Copy(NamedTuple):
    """A copy that was given to one of the transport's streams, for whoever measures."""

    direction: str  # "send" or "receive"
    nbytes: int
    began: torch.cuda.Event
    ended: torch.cuda.Event


@contextlib.contextmanager
def gate(rank: int, doing: str) -> Iterator[None]:
    """Turn what torch raises for the GPU into one error that names the rank and the action."""
    try:
        yield
    except RuntimeError as error:  # torch.AcceleratorError and torch.OutOfMemoryError are ones
        raise DeviceError.of(error, rank, doing) from error.with_traceback(None)


class Loan(Protocol):
    """Memory of the receiver's GPU that the sender writes a message to."""

    @property
    def written(self) -> Moment:
        """When the sender has written it."""

    @property
    def in_place(self) -> bool:
        """Whether it had better be used where it lies."""

    def used(self, stream: Stream) -> None:
        """Take note that a stream was given work that reads it."""
