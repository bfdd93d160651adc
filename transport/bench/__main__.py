"""`python -m transport.bench`: latency and bandwidth of every transport, and of gloo beside them.

Two processes hold all transports open at once and take turns with them, size by size and round by
round, so that a noisy machine cannot favour one. Medians and quartiles over all repetitions.

    half round trip   one message there and one back, halved; received into the caller's own tensor
    fresh             the same, received into a new tensor each time
    one way           a burst of messages in one direction, until the last is received
    both ways         a burst in each direction at once, the two added up

The row "copy" is what the machine can do: one copy from memory to memory within a process.

With --device cuda, which cuda_ipc and nccl imply, tensors are on a GPU, which both ranks share if
there is one; a copy is from its memory to its memory. (Not yet run on hardware.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transport.bench.links import (
    COLUMNS,
    GLOO,
    HEADING,
    TIMEOUT_S,
    TORCH_DIST,
    GlooLink,
    Link,
    OurLink,
    Place,
    line,
    row,
)
from transport.errors import TransportError, UnknownTransport
from transport.registry import NEED_GPU, transport_class
from transport.sockets.handshake import new_secret

if TYPE_CHECKING:
    import torch

    from transport.device import Gpu

SIZES: Final = (8, 4096, 65536, 2**18, 2**20, 2**22, 2**24, 2**26)
BURST_NBYTES: Final = 64 * 1024 * 1024  # a burst moves about this much, and 2 to 64 messages
ROUNDS: Final = 3
ON_CPU: Final = "shm,unix,tcp,gloo"  # what is measured when no names are given
ON_GPU: Final = "cuda_ipc,tcp"
COPY: Final = "copy"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both processes have to agree on."""

    transports: tuple[str, ...]
    sizes: tuple[int, ...]
    rounds: int
    secret: bytes
    gloo_port: int
    gpu: Callable[[int], Gpu] | None = None  # makes a rank's GPU; None: tensors are on the CPU


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What one process measures with: its rank and where its tensors are."""

    rank: int
    place: Place

    def ping_pong(self, link: Link, nbytes: int, repeats: int, *, fresh: bool) -> list[float]:
        """Return the half round trips in seconds, as rank 0 sees them."""
        out, back = self.place.tensor(nbytes), self.place.tensor(nbytes)
        receive: Callable[[torch.Tensor], Any] = link.recv_fresh if fresh else link.recv_into
        times, trips = [], self.place.trips(nbytes)
        for _ in range(-(-repeats // trips)):
            self.place.finish()
            began = time.perf_counter()
            for _ in range(trips):
                if self.rank == 0:
                    link.send(out)
                    receive(back)
                else:
                    receive(back)
                    link.send(out)
            self.place.finish()
            times.append((time.perf_counter() - began) / (2 * trips))
        return times

    def burst(self, link: Link, nbytes: int, *, both: bool) -> float:
        """Return the bytes per second of one burst, as rank 0 sees them."""
        import torch

        rank, count = self.rank, max(2, min(64, BURST_NBYTES // nbytes))
        out, back = self.place.tensor(nbytes), self.place.tensor(nbytes)
        token = torch.zeros(1, dtype=torch.uint8)
        self.place.finish()
        link.send(token) if rank == 0 else link.recv_into(token)
        began = time.perf_counter()
        works = [link.isend(out) for _ in range(count)] if both or rank == 0 else []
        for _ in range(count if both or rank == 1 else 0):
            link.recv_into(back)
        for work in works:
            work.wait()
        self.place.finish()
        link.send(token) if rank == 1 else link.recv_into(token)
        return count * nbytes * (1 + both) / (time.perf_counter() - began)

    def copy(self, nbytes: int, repeats: int) -> list[float]:
        """Return the seconds of one copy within this process."""
        out, back = self.place.tensor(nbytes), self.place.tensor(nbytes)  # warm
        times, trips = [], self.place.trips(nbytes)
        for _ in range(-(-repeats // trips)):
            self.place.finish()
            began = time.perf_counter()
            for _ in range(trips):
                self.place.copy(back, out)
            self.place.finish()
            times.append((time.perf_counter() - began) / trips)
        return times


def _repeats(nbytes: int) -> int:
    return max(8, min(400, 2**25 // max(nbytes, 1)))


def _process(rank: int, pipe: Connection, settings: Settings) -> None:
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

    torch.set_num_threads(1)
    links: dict[str, Any] = {}
    gpu = None if settings.gpu is None else settings.gpu(rank)
    bench = _Bench(rank, Place(gpu))
    for name in settings.transports:
        if name == GLOO:
            links[name] = GlooLink(rank, settings.gloo_port)
        else:
            links[name] = OurLink(name, rank, pipe, settings.secret, gpu)
    for nbytes in settings.sizes:
        found: dict[str, dict[str, list[float]]] = {
            name: {column: [] for column in COLUMNS} for name in (*links, COPY)
        }
        for turn in range(settings.rounds + 1):
            for name, link in links.items():
                repeats = 4 if turn == 0 else _repeats(nbytes)
                trips = bench.ping_pong(link, nbytes, repeats, fresh=False)
                fresh = bench.ping_pong(link, nbytes, repeats, fresh=True)
                one = bench.burst(link, nbytes, both=False)
                both = bench.burst(link, nbytes, both=True)
                if turn:  # the first turn warms up
                    found[name]["half round trip"] += trips
                    found[name]["fresh"] += fresh
                    found[name]["one way"].append(one)
                    found[name]["both ways"].append(both)
            if turn and rank == 0:
                copies = bench.copy(nbytes, _repeats(nbytes))
                found[COPY]["half round trip"] += copies
                found[COPY]["fresh"] += copies
                for column in COLUMNS[2:]:
                    found[COPY][column] += [nbytes / seconds for seconds in copies]
        if rank == 0:
            pipe.send((nbytes, found))
    for link in links.values():
        link.close()


def measure(settings: Settings, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the two processes; return one row a transport and size."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_process, args=(rank, pipes[rank][1], settings), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    ours = [pipe for pipe, _ in pipes]
    for _, theirs in pipes:
        theirs.close()
    for name in settings.transports:
        if name != GLOO:  # each side needs the other's address
            records = [pipe.recv() for pipe in ours]
            ours[0].send(records[1])
            ours[1].send(records[0])
    rows = []
    for _ in settings.sizes:
        nbytes, found = ours[0].recv()
        for name, columns in found.items():
            rows.append(row(name, nbytes, columns))
            show(line(rows[-1]))
    for process in processes:
        process.join(TIMEOUT_S)
    return rows


def cuda(rank: int) -> Gpu:
    """Return a rank's GPU: one each, or the one that there is."""
    import torch

    from transport.cuda.device import Cuda

    return Cuda(torch.device("cuda", rank % torch.cuda.device_count()))


def _check_device(names: Sequence[str], *, on_gpu: bool) -> None:
    """Raise UnknownTransport when tensors cannot be there for these transports."""
    if not on_gpu:
        for name in NEED_GPU.intersection(names):
            raise UnknownTransport(f"{name} is for tensors on a GPU: use --device cuda")
        return
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise UnknownTransport("--device cuda: this machine has no CUDA device that torch can use")
    if GLOO in names:
        raise UnknownTransport(
            "gloo's own calls take CPU tensors: torch_dist stages those of a GPU"
        )
    if "nccl" in names and count < 2:
        raise UnknownTransport(f"nccl needs one GPU a rank: this machine has {count} for 2 ranks")


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m transport.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--transports",
        help="names, with commas between; gloo is torch's own, torch_dist our transport over it; "
        f"{ON_CPU}, on a GPU {ON_GPU}",
    )
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes of a message")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where the tensors are")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each transport")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    parsed = parser.parse_args(arguments)
    names = tuple((parsed.transports or (ON_GPU if parsed.device == "cuda" else ON_CPU)).split(","))
    on_gpu = parsed.device == "cuda" or (parsed.device is None and not NEED_GPU.isdisjoint(names))
    try:
        sizes = tuple(int(size) for size in parsed.sizes.split(","))
        if min(sizes) < 1 or parsed.rounds < 1:
            raise ValueError("sizes and rounds start at 1")
        for name in names:
            if name == "inproc":
                raise UnknownTransport("inproc has no second process to talk to")
            if name != GLOO:
                transport_class(GLOO if name == TORCH_DIST else name)
        _check_device(names, on_gpu=on_gpu)
    except (ValueError, TransportError) as error:
        print(f"transport.bench: {error}", file=sys.stderr)
        return 2
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 2 processes")
    print(HEADING)
    settings = Settings(
        names, sizes, parsed.rounds, new_secret(), _free_port(), cuda if on_gpu else None
    )
    rows = measure(settings, lambda line: print(line, flush=True))
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
