"""What is timed: messages over a link between two processes, and copies within one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
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

COLUMNS: Final = ("half round trip", "fresh", "one way", "both ways")
SECONDS: Final = COLUMNS[:2]  # the other two are bytes a second

Samples = dict[str, list[float]]  # by column


class Gloo:
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
        self.send, self.isend = dist.send, dist.isend

    def recv(self, src: int, *, into: torch.Tensor) -> None:
        """Receive into the tensor."""
        import torch.distributed as dist

        dist.recv(into, src)

    def close(self, timeout: float) -> None:
        """End, with the peer."""
        import torch.distributed as dist

        dist.destroy_process_group()


def connect(name: str, rank: int, other: Connection, secret: bytes, gpu: Gpu | None) -> Any:
    """Return a transport of ours that reaches the other rank."""
    chosen: Any = named_class(GLOO if name == TORCH_DIST else name)
    sockets, address = chosen.listen()
    other.send(address.to_record())
    addresses = {rank: address, 1 - rank: type(address).from_record(other.recv())}
    return chosen(rank, 2, addresses, sockets, secret, gpu=gpu)


class Stopwatch:
    """Times messages as one of the two ranks sees them, with tensors on the CPU or on its GPU.

    A GPU does later what it is told now. So a repetition there is several trips, each behind the
    one before in the streams of both ranks, between two moments at which the GPU has done all.
    """

    def __init__(self, rank: int, gpu: Gpu | None) -> None:
        self._rank, self._peer, self._gpu = rank, 1 - rank, gpu

    def messages(self, link: Any, nbytes: int, repeats: int) -> Samples:
        """Return what one turn of a link measures: of a transport of ours, or of gloo."""
        import torch

        out, back = self._tensor(nbytes), self._tensor(nbytes)

        def trip(receive: Callable[[], object]) -> None:
            if self._rank == 0:
                link.send(out, self._peer)
                receive()
            else:
                receive()
                link.send(out, self._peer)

        def into() -> None:
            link.recv(self._peer, into=back)

        def fresh() -> None:  # gloo has to be told how much comes
            new = {"into": torch.empty_like(out)} if isinstance(link, Gloo) else {}
            link.recv(self._peer, **new)

        trips_s = [self._timed(partial(trip, r), nbytes, repeats) for r in (into, fresh)]
        half_trips_s = [[time_s / 2 for time_s in times_s] for times_s in trips_s]
        rates = [[self._burst(link, out, back, both=both)] for both in (False, True)]
        return dict(zip(COLUMNS, half_trips_s + rates, strict=True))

    def copies(self, nbytes: int, repeats: int) -> Samples:
        """Return the same columns for copies within this process."""
        out, back, gpu = self._tensor(nbytes), self._tensor(nbytes), self._gpu

        def copy() -> None:
            back.copy_(out) if gpu is None else gpu.copy(back, out, gpu.current())

        times_s = self._timed(copy, nbytes, repeats)
        rates = [nbytes / time_s for time_s in times_s]
        return dict(zip(COLUMNS, (times_s, times_s, rates, rates), strict=True))

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

    def _burst(self, link: Any, out: torch.Tensor, back: torch.Tensor, *, both: bool) -> float:
        """Return the bytes per second of one burst, as rank 0 sees them."""
        import torch

        rank, peer, nbytes = self._rank, self._peer, out.nbytes
        count = max(2, min(64, BURST_NBYTES // nbytes))
        token = torch.zeros(1, dtype=torch.uint8)
        self._finish()
        link.send(token, peer) if rank == 0 else link.recv(peer, into=token)
        began = time.perf_counter()
        works = [link.isend(out, peer) for _ in range(count)] if both or rank == 0 else []
        for _ in range(count if both or rank == 1 else 0):
            link.recv(peer, into=back)
        for work in works:
            work.wait()
        self._finish()
        link.send(token, peer) if rank == 1 else link.recv(peer, into=token)
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
