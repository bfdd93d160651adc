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
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from transport.bench.links import GLOO, TORCH_DIST
from transport.bench.measure import Settings, cuda, measure
from transport.errors import TransportError, UnknownTransport
from transport.registry import NEED_GPU, transport_class
from transport.sockets.handshake import new_secret

SIZES: Final = (8, 4096, 65536, 2**18, 2**20, 2**22, 2**24, 2**26)
ROUNDS: Final = 3
ON_CPU: Final = "shm,unix,tcp,gloo"  # what is measured when no names are given
ON_GPU: Final = "cuda_ipc,tcp"
HEADING: Final = (
    f"{'bytes':>9}  {'':<10} {'half trip us':>10} {'[quartiles':>11} {'':>9}] {'fresh us':>8} "
    f"{'1-way GB/s':>8} {'both':>6}"
)


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


def _line(row: dict[str, Any]) -> str:
    """Return a row as it is printed below the heading."""
    low, high = row["half_round_trip_us_quartiles"]
    return (
        f"{row['nbytes']:>9}  {row['transport']:<10} {row['half_round_trip_us']:>10.1f} "
        f"[{low:>9.1f} {high:>9.1f}] {row['fresh_us']:>10.1f} "
        f"{row['one_way_gb_per_s']:>8.2f} {row['both_ways_gb_per_s']:>8.2f}"
    )


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
    settings = Settings(names, sizes, parsed.rounds, new_secret(), cuda if on_gpu else None)
    rows = measure(settings, lambda row: print(_line(row), flush=True))
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
