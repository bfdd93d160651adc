"""Ranks in processes of their own, each with a GPU; for tests only.

With a real GPU the processes are spawned: one in which CUDA has begun cannot be forked.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from fake_gpu import FakeGpu

from transport.errors import TransportClosed
from transport.sockets.handshake import new_secret
from transport.sockets.transport import TcpTransport

LIMIT_S = 60.0

Body = Callable[[Any, Any], Any]  # is given the transport and the pipe, returns what is told


def fake(rank: int) -> FakeGpu:
    return FakeGpu(rank, 0.002)


def _rank(
    place: tuple[int, int, bytes],
    cls: type[TcpTransport],
    gpu: Callable[[int], Any],
    body: Body,
    pipe: Connection,
) -> None:
    import torch

    torch.set_num_threads(1)
    rank, world_size, secret = place
    sockets, address = cls.listen()
    pipe.send(address)
    book = pipe.recv()
    device = gpu(rank)
    transport = cls(rank, world_size, book, sockets, secret, gpu=device)
    try:
        pipe.send(("returned", body(transport, pipe)))
    except Exception as error:
        pipe.send(("raised", f"{type(error).__name__}: {error}"))
    finally:
        transport.abort(TransportClosed("the test is over"))


@contextlib.contextmanager
def processes(
    cls: type[TcpTransport], world_size: int, body: Body, gpu: Callable[[int], Any] = fake
) -> Iterator[tuple[list[Any], list[Connection]]]:
    """Start the ranks; yield their processes and the pipes over which they tell what became of it.

    Nothing of them is there any more at the end of the `with` block.
    """
    context: Any = multiprocessing.get_context("fork" if gpu is fake else "spawn")
    secret = new_secret()
    pipes = [context.Pipe() for _ in range(world_size)]
    ranks = [
        context.Process(
            target=_rank,
            args=((rank, world_size, secret), cls, gpu, body, pipes[rank][1]),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    ours = [pipe for pipe, _ in pipes]
    try:
        for _, theirs in pipes:
            theirs.close()
        book = {rank: told(ours[rank]) for rank in range(world_size)}
        for pipe in ours:
            pipe.send(book)
        yield ranks, ours
        for process in ranks:
            process.join(LIMIT_S)
        assert not any(process.is_alive() for process in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
            process.close()
        for pipe in ours:
            pipe.close()


def told(pipe: Connection) -> Any:
    """Return what a rank says next."""
    assert pipe.poll(LIMIT_S), "a rank is silent"
    return pipe.recv()
