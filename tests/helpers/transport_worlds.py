"""Worlds of ranks that are threads of one process, over every transport; for tests only."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import on_gpu
import real_gpu
import torch
from fake_gpu import FakeGpu

from transport.base import Transport
from transport.cuda.transport import CudaIpcTransport
from transport.errors import TransportClosed
from transport.inproc import InprocHub
from transport.shm.transport import ShmTransport
from transport.sockets.addresses import Address
from transport.sockets.handshake import new_secret
from transport.sockets.transport import TcpTransport, UnixTransport
from transport.torch_dist.transport import GlooTransport

SOCKETS: dict[str, type[TcpTransport]] = {
    "tcp": TcpTransport,
    "unix": UnixTransport,
    "shm": ShmTransport,
    "cuda_ipc": CudaIpcTransport,
    "gloo": GlooTransport,
}
NAMES = ["inproc", *SOCKETS]
ON_GPU = ["inproc+gpu", "tcp+gpu", "cuda_ipc+gpu"]
if real_gpu.THERE:
    ON_GPU += ["inproc+cuda", "tcp+cuda", "cuda_ipc+cuda"]
SOON_S = 20.0  # the limit of what should take milliseconds, on a machine that is loaded

Result = TypeVar("Result")


def make(name: str, world_size: int, **options: Any) -> list[Any]:
    """Return the transports of a world, in rank order; `options` are for sockets alone.

    Those of a name with "+gpu" or "+cuda" have a GPU each, and bring every tensor there and back.
    """
    if name == "inproc":
        return list(InprocHub(world_size).transports())
    if name.startswith("inproc+"):
        hub = InprocHub(world_size)
        return [on_gpu.InprocOnGpu(hub, rank, gpu=gpu_of(name, rank)) for rank in range(world_size)]
    secret = new_secret()
    return make_from_secrets(name, [secret] * world_size, **options)


def make_from_secrets(name: str, secrets: list[bytes], **options: Any) -> list[TcpTransport]:
    """Return socket transports of which each has a secret of its own."""
    base, _, which = name.partition("+")
    cls = on_gpu.SOCKETS[base] if which else SOCKETS[name]
    gpus = options.pop("gpus", None) or [gpu_of(name, rank) for rank in range(len(secrets))]
    listening = [cls.listen() for _ in secrets]
    book: dict[int, Address] = {rank: address for rank, (_, address) in enumerate(listening)}
    return [
        cls(rank, len(secrets), book, listening[rank][0], secret, gpu=gpus[rank], **options)
        for rank, secret in enumerate(secrets)
    ]


def gpu_of(name: str, rank: int) -> Any:
    """Return a rank's GPU: a fake one for "+gpu", this machine's for "+cuda"."""
    if name.endswith("+gpu"):
        return FakeGpu(rank)
    return real_gpu.RealGpu(rank) if name.endswith("+cuda") else None


@contextlib.contextmanager
def world(name: str, world_size: int, **options: Any) -> Iterator[list[Any]]:
    """Make a world for the length of a `with` block; afterwards it is aborted."""
    transports = make(name, world_size, **options)
    try:
        yield transports
    finally:
        for transport in transports:
            transport.abort(TransportClosed("the test is over"))
            if transport.gpu is not None:
                transport.gpu.close()


def start(function: Callable[[], Result]) -> Future[Result]:
    """Run a function in a thread of its own."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def on_all_ranks(transports: list[Any], function: Callable[[Transport], Result]) -> list[Result]:
    """Run `function(transport)` on every rank at once; return what each returned."""
    futures = [start(lambda t=transport: function(t)) for transport in transports]  # type: ignore[misc]
    return [future.result(SOON_S) for future in futures]


def eventually(condition: Callable[[], bool], timeout: float = SOON_S) -> None:
    """Wait for what no event announces."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "this did not come true in time"
        time.sleep(0.001)


def distinct(tensor: torch.Tensor) -> list[float]:
    """Return a tensor's values, each once; `unique` alone would sort millions of equal ones."""
    if tensor.numel():
        low, high = tensor.aminmax()
        if low == high:
            return [low.item()]
    return tensor.unique().tolist()
