"""`python -m transport.bench`: latency and bandwidth of every transport, and of gloo beside them.

Two processes hold all transports open at once and take turns with them, size by size and round by
round, so that a noisy machine cannot favour one. Medians and quartiles over all repetitions.

    half round trip   one message there and one back, halved; received into the caller's own tensor
    fresh             the same, received into a new tensor each time
    one way           a burst of messages in one direction, until the last is received
    both ways         a burst in each direction at once, the two added up

The row "copy" is what the machine can do: one copy from memory to memory within a process.
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
from typing import TYPE_CHECKING, Any, Final, Protocol

from transport.errors import TransportError, UnknownTransport
from transport.handshake import new_secret
from transport.registry import transport_class
from transport.table import COLUMNS, HEADING, line, row

if TYPE_CHECKING:
    import torch

SIZES: Final = (8, 4096, 65536, 2**18, 2**20, 2**22, 2**24, 2**26)
BURST_NBYTES: Final = 64 * 1024 * 1024  # a burst moves about this much, and 2 to 64 messages
ROUNDS: Final = 3
TIMEOUT_S: Final = 60.0
GLOO: Final = "gloo"  # torch's own calls, without anything of ours; our transport over gloo is
TORCH_DIST: Final = "torch_dist"
COPY: Final = "copy"


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


class _OurLink:
    def __init__(self, name: str, rank: int, pipe: Connection, secret: bytes) -> None:
        chosen: Any = transport_class(GLOO if name == TORCH_DIST else name)
        sockets, address = chosen.listen()
        pipe.send(address.to_record())
        other = type(address).from_record(pipe.recv())
        addresses = {rank: address, 1 - rank: other}
        self._transport = chosen(rank, 2, addresses, sockets, secret)
        self._peer = 1 - rank

    def send(self, tensor: torch.Tensor) -> None:
        self._transport.send(tensor, self._peer)

    def isend(self, tensor: torch.Tensor) -> Any:
        return self._transport.isend(tensor, self._peer)

    def recv_into(self, tensor: torch.Tensor) -> None:
        self._transport.recv(self._peer, into=tensor)

    def recv_fresh(self, like: torch.Tensor) -> None:
        self._transport.recv(self._peer)

    def close(self) -> None:
        self._transport.close(TIMEOUT_S)


class _GlooLink:
    def __init__(self, rank: int, port: int) -> None:
        import torch.distributed as dist

        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, 2, is_master=rank == 0
        )
        dist.init_process_group(GLOO, store=store, rank=rank, world_size=2)
        self._dist, self._peer = dist, 1 - rank

    def send(self, tensor: torch.Tensor) -> None:
        self._dist.send(tensor, self._peer)

    def isend(self, tensor: torch.Tensor) -> Any:
        return self._dist.isend(tensor, self._peer)

    def recv_into(self, tensor: torch.Tensor) -> None:
        self._dist.recv(tensor, self._peer)

    def recv_fresh(self, like: torch.Tensor) -> None:
        import torch

        self._dist.recv(torch.empty_like(like), self._peer)

    def close(self) -> None:
        self._dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both processes have to agree on."""

    transports: tuple[str, ...]
    sizes: tuple[int, ...]
    rounds: int
    secret: bytes
    gloo_port: int


def _ping_pong(link: Link, rank: int, nbytes: int, repeats: int, *, fresh: bool) -> list[float]:
    """Return the half round trips in seconds, as rank 0 sees them."""
    import torch

    out = torch.ones(nbytes, dtype=torch.uint8)
    back = torch.empty_like(out)
    receive: Callable[[torch.Tensor], Any] = link.recv_fresh if fresh else link.recv_into
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        if rank == 0:
            link.send(out)
            receive(back)
        else:
            receive(back)
            link.send(out)
        times.append((time.perf_counter() - began) / 2)
    return times


def _burst(link: Link, rank: int, nbytes: int, *, both: bool) -> float:
    """Return the bytes per second of one burst, as rank 0 sees them."""
    import torch

    count = max(2, min(64, BURST_NBYTES // nbytes))
    out = torch.ones(nbytes, dtype=torch.uint8)
    back = torch.empty_like(out)
    token = torch.zeros(1, dtype=torch.uint8)
    link.send(token) if rank == 0 else link.recv_into(token)
    began = time.perf_counter()
    works = [link.isend(out) for _ in range(count)] if both or rank == 0 else []
    for _ in range(count if both or rank == 1 else 0):
        link.recv_into(back)
    for work in works:
        work.wait()
    link.send(token) if rank == 1 else link.recv_into(token)
    return count * nbytes * (1 + both) / (time.perf_counter() - began)


def _copy(nbytes: int, repeats: int) -> list[float]:
    """Return the seconds of one copy within this process."""
    import torch

    out = torch.ones(nbytes, dtype=torch.uint8)
    back = torch.ones(nbytes, dtype=torch.uint8)  # warm, as a buffer that is used again
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        back.copy_(out)
        times.append(time.perf_counter() - began)
    return times


def _repeats(nbytes: int) -> int:
    return max(8, min(400, 2**25 // max(nbytes, 1)))


def _process(rank: int, pipe: Connection, settings: Settings) -> None:
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

    torch.set_num_threads(1)
    links: dict[str, Any] = {}
    for name in settings.transports:
        if name == GLOO:
            links[name] = _GlooLink(rank, settings.gloo_port)
        else:
            links[name] = _OurLink(name, rank, pipe, settings.secret)
    for nbytes in settings.sizes:
        found: dict[str, dict[str, list[float]]] = {
            name: {column: [] for column in COLUMNS} for name in (*links, COPY)
        }
        for turn in range(settings.rounds + 1):
            for name, link in links.items():
                repeats = 4 if turn == 0 else _repeats(nbytes)
                trips = _ping_pong(link, rank, nbytes, repeats, fresh=False)
                fresh = _ping_pong(link, rank, nbytes, repeats, fresh=True)
                one = _burst(link, rank, nbytes, both=False)
                both = _burst(link, rank, nbytes, both=True)
                if turn:  # the first turn warms up
                    found[name]["half round trip"] += trips
                    found[name]["fresh"] += fresh
                    found[name]["one way"].append(one)
                    found[name]["both ways"].append(both)
            if turn and rank == 0:
                copies = _copy(nbytes, _repeats(nbytes))
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
        default="shm,unix,tcp,gloo",
        help="names, with commas between; gloo is torch's own, torch_dist our transport over it",
    )
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes of a message")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each transport")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    parsed = parser.parse_args(arguments)
    names = tuple(parsed.transports.split(","))
    try:
        sizes = tuple(int(size) for size in parsed.sizes.split(","))
        if min(sizes) < 1 or parsed.rounds < 1:
            raise ValueError("sizes and rounds start at 1")
        for name in names:
            if name == "inproc":
                raise UnknownTransport("inproc has no second process to talk to")
            if name != GLOO:
                transport_class(GLOO if name == TORCH_DIST else name)
    except (ValueError, TransportError) as error:
        print(f"transport.bench: {error}", file=sys.stderr)
        return 2
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 2 processes")
    print(HEADING)
    settings = Settings(names, sizes, parsed.rounds, new_secret(), _free_port())
    rows = measure(settings, lambda line: print(line, flush=True))
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
