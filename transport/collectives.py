"""Broadcast, all-reduce and barrier, built on send and recv along the line of ranks.

    broadcast from 2:   0 <── 1 <── 2 ──> 3
    all-reduce:         0 ──> 1 ──> 2 ──> 3   then a broadcast from 3

1. Only neighbours talk, so a pipeline needs no connection that it does not have already.
2. The order of the arithmetic is the order of the ranks: the same bits at every call.
3. Every rank calls the same collectives in the same order; messages of one tag keep their order,
   so two calls in a row cannot mix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import torch

from transport.errors import InvalidArgument, WaitTimeout
from transport.message.work import deadline_after, remaining

if TYPE_CHECKING:
    from transport.base import Transport
    from transport.message.specs import Message

BROADCAST_TAG: Final = -1  # negative tags are the transport's own
REDUCE_TAG: Final = -2

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def broadcast(
    transport: Transport, message: Message | None, root: int, *, timeout: float | None = None
) -> Message:
    """Return the root's message on every rank; the others pass None. Blocks until it is here.

    Raises:
        InvalidArgument: no such root, or the root passed None.
        WaitTimeout, PeerLost, JobFailed, ...: as `Work.wait`.
    """
    rank, last = transport.rank, transport.world_size - 1
    if not 0 <= root <= last:
        raise InvalidArgument(f"rank {root} cannot be a root in a world of {last + 1}")
    with _limit(timeout, f"a broadcast from rank {root}") as deadline:
        if rank != root:
            source = rank + 1 if rank < root else rank - 1
            message = transport.receive(source, BROADCAST_TAG, timeout=remaining(deadline))
        if message is None:
            raise InvalidArgument(f"rank {rank} is the root of this broadcast and has no message")
        onward = [rank - 1] if rank <= root and rank > 0 else []
        onward += [rank + 1] if rank >= root and rank < last else []
        for work in [transport.isend(message, dst, BROADCAST_TAG) for dst in onward]:
            work.wait(remaining(deadline))
    return message


def all_reduce(
    transport: Transport,
    tensor: torch.Tensor,
    combine: Combine = torch.add,
    *,
    timeout: float | None = None,
) -> torch.Tensor:
    """Return combine(...combine(tensor of rank 0, tensor of rank 1)..., tensor of the last).

    All ranks pass the same dtype and shape; the argument is not changed. Blocks until the result
    is here, and raises what `Work.wait` raises.
    """
    rank, last = transport.rank, transport.world_size - 1
    with _limit(timeout, "an all-reduce") as deadline:
        if rank > 0:
            so_far = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            transport.receive(rank - 1, REDUCE_TAG, into=so_far, timeout=remaining(deadline))
            tensor = combine(so_far, tensor)
        if rank < last:
            transport.send(tensor, rank + 1, REDUCE_TAG, timeout=remaining(deadline))
        whole = tensor.detach().clone() if rank == last else None
        reduced = broadcast(transport, whole, last, timeout=remaining(deadline))
    assert isinstance(reduced, torch.Tensor)
    return reduced


def barrier(transport: Transport, *, timeout: float | None = None) -> None:
    """Return when every rank has called; raises what `Work.wait` raises."""
    with _limit(timeout, "a barrier") as deadline:
        all_reduce(transport, torch.empty(0), timeout=remaining(deadline))


@contextlib.contextmanager
def _limit(timeout: float | None, what: str) -> Iterator[float | None]:
    """Yield the deadline of a whole collective; say its own seconds when they are over."""
    try:
        yield deadline_after(timeout)
    except WaitTimeout:
        raise WaitTimeout(f"nothing after {timeout} s of waiting for {what}") from None
