"""What the benchmark measures: a link between two ranks, and the place where its tensors are."""

from __future__ import annotations

import statistics
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final, Protocol

from transport.registry import named_class

if TYPE_CHECKING:
    import torch

    from transport.device import Gpu

TIMEOUT_S: Final = 60.0
GLOO: Final = "gloo"  # torch's own calls, without anything of ours; our transport over gloo is
TORCH_DIST: Final = "torch_dist"


class Link(Protocol):
    """What a measurement needs of a transport between two ranks."""

    def send(self, tensor: torch.Tensor) -> Any:
        """Send and return when the tensor may be written again."""

    def isend(self, tensor: torch.Tensor) -> Any:
        """Start to send; return something with wait()."""

    def recv_into(self, tensor: torch.Tensor) -> Any:
        """Receive into the tensor."""

    def recv_fresh(self, like: torch.Tensor) -> Any:
        """Receive into new memory."""


class OurLink:
    """A transport of ours."""

    def __init__(
        self, name: str, rank: int, pipe: Connection, secret: bytes, gpu: Gpu | None
    ) -> None:
        chosen: Any = named_class(GLOO if name == TORCH_DIST else name)
        sockets, address = chosen.listen()
        pipe.send(address.to_record())
        other = type(address).from_record(pipe.recv())
        addresses = {rank: address, 1 - rank: other}
        self._transport = chosen(rank, 2, addresses, sockets, secret, gpu=gpu)
        self._peer = 1 - rank

    def send(self, tensor: torch.Tensor) -> None:
        """Send and return when the tensor may be written again."""
        self._transport.send(tensor, self._peer)

    def isend(self, tensor: torch.Tensor) -> Any:
        """Start to send."""
        return self._transport.isend(tensor, self._peer)

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

    def __init__(self, rank: int, port: int) -> None:
        import torch.distributed as dist

        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, 2, is_master=rank == 0
        )
        dist.init_process_group(GLOO, store=store, rank=rank, world_size=2)
        self._dist, self._peer = dist, 1 - rank

    def send(self, tensor: torch.Tensor) -> None:
        """Send and return when the tensor may be written again."""
        self._dist.send(tensor, self._peer)

    def isend(self, tensor: torch.Tensor) -> Any:
        """Start to send."""
        return self._dist.isend(tensor, self._peer)

    def recv_into(self, tensor: torch.Tensor) -> None:
        """Receive into the tensor."""
        self._dist.recv(tensor, self._peer)

    def recv_fresh(self, like: torch.Tensor) -> None:
        """Receive into new memory."""
        import torch

        self._dist.recv(torch.empty_like(like), self._peer)

    def close(self) -> None:
        """End, with the peer."""
        self._dist.destroy_process_group()


class Place:
    """Where the tensors are: on the CPU, or on a GPU, whose work is timed as a whole.

    A GPU does later what it is told now. So a repetition there is several trips, each behind the
    one before in the streams of both ranks, between two moments at which the GPU has done all.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu

    def tensor(self, nbytes: int) -> torch.Tensor:
        """Return memory that is there already, as that of a program which goes on for long."""
        import torch

        from transport.message.specs import TensorSpec

        if self._gpu is None:
            return torch.ones(nbytes, dtype=torch.uint8)
        return self._gpu.fresh(TensorSpec(torch.uint8, (nbytes,)))

    def trips(self, nbytes: int) -> int:
        """Return how many make a repetition."""
        return 1 if self._gpu is None else max(2, min(20, 2**24 // nbytes))

    def finish(self) -> None:
        """Wait until all is done that the calling thread has given its GPU."""
        if self._gpu is not None:
            self._gpu.now().synchronize()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy, within this process."""
        if self._gpu is None:
            target.copy_(source)
        else:
            self._gpu.copy(target, source, self._gpu.current())


# The table of `python -m transport.bench`: a row a transport and size, medians and quartiles.

COLUMNS: Final = ("half round trip", "fresh", "one way", "both ways")  # seconds, then bytes/second

HEADING: Final = (
    f"{'bytes':>9}  {'':<10} {'half trip us':>10} {'[quartiles':>11} {'':>9}] {'fresh us':>8} "
    f"{'1-way GB/s':>8} {'both':>6}"
)


def row(name: str, nbytes: int, columns: dict[str, list[float]]) -> dict[str, Any]:
    """Return what was measured of one transport and size, as the JSON holds it."""
    made: dict[str, Any] = {"transport": name, "nbytes": nbytes}
    for column, values in columns.items():
        key = column.replace(" ", "_")
        scale, unit = (1e6, "us") if column in COLUMNS[:2] else (1e-9, "gb_per_s")
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        made[f"{key}_{unit}"] = round(statistics.median(values) * scale, 3)
        made[f"{key}_{unit}_quartiles"] = [round(quarters[i] * scale, 3) for i in (0, 2)]
    return made


def line(row: dict[str, Any]) -> str:
    """Return a row as it is printed below the heading."""
    low, high = row["half_round_trip_us_quartiles"]
    return (
        f"{row['nbytes']:>9}  {row['transport']:<10} {row['half_round_trip_us']:>10.1f} "
        f"[{low:>9.1f} {high:>9.1f}] {row['fresh_us']:>10.1f} "
        f"{row['one_way_gb_per_s']:>8.2f} {row['both_ways_gb_per_s']:>8.2f}"
    )
