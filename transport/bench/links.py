"""What is timed: messages over a link between two processes, and copies within one."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from transport.message.specs import TensorSpec
from transport.registry import named_class

if TYPE_CHECKING:
    import torch

    from transport.device import Gpu

TIMEOUT_S: Final = 60.0
GLOO: Final = "gloo"  # torch's own calls, without anything of ours; our transport over gloo is
TORCH_DIST: Final = "torch_dist"
BURST_NBYTES: Final = 64 * 1024 * 1024  # a burst moves about this much, and 2 to 64 messages

Samples = dict[str, list[float]]  # by column: seconds, or bytes a second


class OurLink:
    """A transport of ours."""

    def __init__(
        self, name: str, rank: int, other: Connection, secret: bytes, gpu: Gpu | None
    ) -> None:
        chosen: Any = named_class(GLOO if name == TORCH_DIST else name)
        sockets, address = chosen.listen()
        other.send(address.to_record())
        addresses = {rank: address, 1 - rank: type(address).from_record(other.recv())}
        self._transport = chosen(rank, 2, addresses, sockets, secret, gpu=gpu)
        self._peer = 1 - rank

    def isend(self, tensor: torch.Tensor) -> Any:
        """Start to send; return something with wait()."""
        return self._transport.isend(tensor, self._peer)

    def send(self, tensor: torch.Tensor) -> None:
        """Send and return when the tensor may be written again."""
        self._transport.send(tensor, self._peer)

    def recv_into(self, tensor: torch.Tensor) -> None:
        """Receive into the tensor."""
        self._transport.recv(self._peer, into=tensor)

    def recv_fresh(self, like: torch.Tensor) -> None:
        """Receive into new memory."""
        self._transport.recv(self._peer)

    def close(self) -> None:
        """End, with the peer."""
        self._transport.close(TIMEOUT_S)


class GlooLink:
    """torch's own calls, without anything of ours."""

    def __init__(self, rank: int, other: Connection) -> None:
        import torch.distributed as dist

        port = 0 if rank == 0 else other.recv()
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False
        )
        if rank == 0:
            other.send(store.port)
        dist.init_process_group(GLOO, store=store, rank=rank, world_size=2)
        self._dist, self._peer = dist, 1 - rank

    def isend(self, tensor: torch.Tensor) -> Any:
        """Start to send."""
        return self._dist.isend(tensor, self._peer)

    def send(self, tensor: torch.Tensor) -> None:
        """Send and return when the tensor may be written again."""
        self._dist.send(tensor, self._peer)

    def recv_into(self, tensor: torch.Tensor) -> None:
        """Receive into the tensor."""
        self._dist.recv(tensor, self._peer)

    def recv_fresh(self, like: torch.Tensor) -> None:
        """Receive into new memory."""
        import torch

        self.recv_into(torch.empty_like(like))

    def close(self) -> None:
        """End, with the peer."""
        self._dist.destroy_process_group()


class Stopwatch:
    """Times messages as one of the two ranks sees them, with tensors on the CPU or on its GPU.

    A GPU does later what it is told now. So a repetition there is several trips, each behind the
    one before in the streams of both ranks, between two moments at which the GPU has done all.
    """

    def __init__(self, rank: int, gpu: Gpu | None) -> None:
        self._rank, self._gpu = rank, gpu

    def messages(self, link: OurLink | GlooLink, nbytes: int, repeats: int) -> Samples:
        """Return what one turn of a link measures."""
        return {
            "half round trip": self._half_trips(link, link.recv_into, nbytes, repeats),
            "fresh": self._half_trips(link, link.recv_fresh, nbytes, repeats),
            "one way": [self._burst(link, nbytes, both=False)],
            "both ways": [self._burst(link, nbytes, both=True)],
        }

    def copies(self, nbytes: int, repeats: int) -> Samples:
        """Return the same columns for copies within this process."""
        out, back, gpu = self._tensor(nbytes), self._tensor(nbytes), self._gpu

        def copy() -> None:
            back.copy_(out) if gpu is None else gpu.copy(back, out, gpu.current())

        times_s = self._timed(copy, nbytes, repeats)
        rates = [nbytes / time_s for time_s in times_s]
        return {"half round trip": times_s, "fresh": times_s, "one way": rates, "both ways": rates}

    def _half_trips(
        self,
        link: OurLink | GlooLink,
        receive: Callable[[torch.Tensor], None],
        nbytes: int,
        repeats: int,
    ) -> list[float]:
        out, back = self._tensor(nbytes), self._tensor(nbytes)

        def trip() -> None:
            if self._rank == 0:
                link.send(out)
                receive(back)
            else:
                receive(back)
                link.send(out)

        return [time_s / 2 for time_s in self._timed(trip, nbytes, repeats)]

    def _timed(self, trip: Callable[[], None], nbytes: int, repeats: int) -> list[float]:
        """Return the seconds of a trip, for each repetition."""
        times_s, trips = [], 1 if self._gpu is None else max(2, min(20, 2**24 // nbytes))
        for _ in range(-(-repeats // trips)):
            self._finish()
            began = time.perf_counter()
            for _ in range(trips):
                trip()
            self._finish()
            times_s.append((time.perf_counter() - began) / trips)
        return times_s

    def _burst(self, link: OurLink | GlooLink, nbytes: int, *, both: bool) -> float:
        """Return the bytes per second of one burst, as rank 0 sees them."""
        import torch

        rank, count = self._rank, max(2, min(64, BURST_NBYTES // nbytes))
        out, back = self._tensor(nbytes), self._tensor(nbytes)
        token = torch.zeros(1, dtype=torch.uint8)
        self._finish()
        link.send(token) if rank == 0 else link.recv_into(token)
        began = time.perf_counter()
        works = [link.isend(out) for _ in range(count)] if both or rank == 0 else []
        for _ in range(count if both or rank == 1 else 0):
            link.recv_into(back)
        for work in works:
            work.wait()
        self._finish()
        link.send(token) if rank == 1 else link.recv_into(token)
        return count * nbytes * (1 + both) / (time.perf_counter() - began)

    def _tensor(self, nbytes: int) -> torch.Tensor:
        """Return memory that is there already, as that of a program which goes on for long."""
        import torch

        if self._gpu is None:
            return torch.ones(nbytes, dtype=torch.uint8)
        return self._gpu.fresh(TensorSpec(torch.uint8, (nbytes,)))

    def _finish(self) -> None:
        """Wait until all is done that this thread has given its GPU."""
        if self._gpu is not None:
            self._gpu.now().synchronize()
