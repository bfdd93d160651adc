"""Two processes that take turns with all transports, and what they measured as rows of figures."""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from transport.bench.links import GLOO, SECONDS, TIMEOUT_S, Gloo, Samples, Stopwatch, connect

if TYPE_CHECKING:
    from transport.device import Gpu

COPY: Final = "copy"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both processes have to agree on."""

    transports: Sequence[str]
    sizes: Sequence[int]
    rounds: int
    secret: bytes
    gpu: Callable[[int], Gpu] | None = None  # makes a rank's GPU; None: tensors are on the CPU


def measure(settings: Settings, show: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Run the two processes; return one row a transport and size."""
    context = multiprocessing.get_context("spawn")
    results, rank_0 = context.Pipe(duplex=False)
    ends = context.Pipe()  # from one process to the other
    processes = [
        context.Process(target=_process, args=(rank, ends[rank], told, settings), daemon=True)
        for rank, told in enumerate((rank_0, None))
    ]
    for process in processes:
        process.start()
    for pipe in (*ends, rank_0):
        pipe.close()
    rows = []
    for _ in settings.sizes:
        nbytes, found = results.recv()
        for name, samples in found.items():
            rows.append(_row(name, nbytes, samples))
            show(rows[-1])
    for process in processes:
        process.join(TIMEOUT_S)
    return rows


def _process(rank: int, other: Connection, results: Connection | None, settings: Settings) -> None:
    """Take turns with all links, as one of the two ranks; rank 0 tells what it saw."""
    import torch

    torch.set_num_threads(1)
    gpu = None if settings.gpu is None else settings.gpu(rank)
    stopwatch = Stopwatch(rank, gpu)
    links = {
        name: Gloo(rank, other)
        if name == GLOO
        else connect(name, rank, other, settings.secret, gpu)
        for name in settings.transports
    }
    for nbytes in settings.sizes:
        repeats = max(8, min(400, 2**25 // nbytes))
        found: dict[str, Samples] = {}
        for link in links.values():
            stopwatch.messages(link, nbytes, 4)  # warms up
        for _ in range(settings.rounds):
            for name, link in links.items():
                _add(found, name, stopwatch.messages(link, nbytes, repeats))
            if results is not None:
                _add(found, COPY, stopwatch.copies(nbytes, repeats))
        if results is not None:
            results.send((nbytes, found))
    for link in links.values():
        link.close(TIMEOUT_S)


def _add(found: dict[str, Samples], name: str, samples: Samples) -> None:
    before = found.get(name, {})
    found[name] = {column: before.get(column, []) + samples[column] for column in samples}


def _row(name: str, nbytes: int, samples: Samples) -> dict[str, Any]:
    """Return what was measured of one transport and size, as the JSON holds it."""
    row: dict[str, Any] = {"transport": name, "nbytes": nbytes}
    for column, values in samples.items():
        scale, unit = (1e6, "us") if column in SECONDS else (1e-9, "gb_per_s")
        key = f"{column.replace(' ', '_')}_{unit}"
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        row[key] = round(statistics.median(values) * scale, 3)
        row[f"{key}_quartiles"] = [round(quarters[i] * scale, 3) for i in (0, 2)]
    return row


def cuda(rank: int) -> Gpu:
    """Return a rank's GPU: one each, or the one that there is."""
    import torch

    from transport.cuda.device import Cuda

    return Cuda(torch.device("cuda", rank % torch.cuda.device_count()))
