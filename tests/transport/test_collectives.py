"""Broadcast, all-reduce and barrier over every transport, as threads of one process."""

from __future__ import annotations

import random
import threading
import time
from functools import reduce

import pytest
import torch
from transport_worlds import NAMES, SOON_S, on_all_ranks, start, world

from transport.base import Transport
from transport.collectives import all_reduce, barrier, broadcast
from transport.errors import (
    InvalidArgument,
    MessageMismatch,
    PeerLost,
    TransportClosed,
    WaitTimeout,
)

SIZES = [1, 2, 3, 5]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def own_tensor(rank: int, *shape: int) -> torch.Tensor:
    """Numbers of very different size, so that their sum depends on the order."""
    generator = torch.Generator().manual_seed(rank)
    scale = 10.0 ** torch.randint(-6, 7, shape, generator=generator)
    return torch.randn(shape, generator=generator) * scale


@pytest.mark.parametrize("world_size", SIZES)
def test_broadcast_from_every_root(name: str, world_size: int) -> None:
    with world(name, world_size) as transports:
        for root in range(world_size):
            sent = own_tensor(root, 3, 5)

            def call(transport: Transport, root: int = root, sent: torch.Tensor = sent) -> object:
                return broadcast(transport, sent if transport.rank == root else None, root)

            for got in on_all_ranks(transports, call):
                assert torch.equal(got, sent)  # type: ignore[arg-type]


def test_broadcast_carries_tuples_and_every_shape(name: str) -> None:
    messages = [
        (torch.arange(3), torch.ones(2, 2, dtype=torch.bool)),
        torch.tensor(7.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.arange(12.0).reshape(3, 4).T,  # not contiguous
    ]
    with world(name, 3) as transports:
        for message in messages:

            def call(transport: Transport, message: object = message) -> object:
                return broadcast(transport, message if transport.rank == 1 else None, 1)  # type: ignore[arg-type]

            for got in on_all_ranks(transports, call):
                pairs = (
                    zip(got, message, strict=True)
                    if isinstance(message, tuple)
                    else [(got, message)]
                )  # type: ignore[call-overload]
                for mine, theirs in pairs:
                    assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_a_wrong_root_is_named(name: str) -> None:
    with world(name, 2) as transports:
        with pytest.raises(InvalidArgument, match="rank 2 cannot be a root in a world of 2"):
            broadcast(transports[0], torch.ones(1), 2)
        with pytest.raises(InvalidArgument, match="rank 0 is the root .* has no message"):
            broadcast(transports[0], None, 0)


@pytest.mark.parametrize("world_size", SIZES)
def test_all_reduce_adds_in_the_order_of_the_ranks(name: str, world_size: int) -> None:
    tensors = [own_tensor(rank, 257) for rank in range(world_size)]
    expected = reduce(torch.add, tensors)
    if world_size > 2:
        assert not torch.equal(expected, reduce(torch.add, tensors[::-1]))  # order matters here
    with world(name, world_size) as transports:
        for _ in range(3):
            for got in on_all_ranks(transports, lambda t: all_reduce(t, tensors[t.rank])):
                assert torch.equal(got, expected)
    for rank, tensor in enumerate(tensors):
        assert torch.equal(tensor, own_tensor(rank, 257))  # the argument is not changed


def test_all_reduce_with_other_functions(name: str) -> None:
    tensors = [own_tensor(rank, 4, 4) for rank in range(4)]
    combines = [
        torch.maximum,
        torch.minimum,
        torch.mul,
        lambda a, b: a - b,  # neither commutative nor associative: the order is the promise
        lambda a, b: a.mul_(0.5).add_(b),  # in place, on what it was handed
    ]
    with world(name, 4) as transports:
        for combine in combines:
            expected = reduce(combine, [tensor.clone() for tensor in tensors])

            def call(transport: Transport, combine: object = combine) -> torch.Tensor:
                return all_reduce(transport, tensors[transport.rank], combine)  # type: ignore[arg-type]

            for got in on_all_ranks(transports, call):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_all_reduce_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    tensors = [(torch.arange(6) + rank).to(dtype) for rank in range(3)]
    with world(name, 3) as transports:
        for got in on_all_ranks(transports, lambda t: all_reduce(t, tensors[t.rank])):
            assert got.dtype == dtype and torch.equal(got, reduce(torch.add, tensors))


def test_results_belong_to_the_caller(name: str) -> None:
    tensors = [torch.full((4,), float(rank), requires_grad=rank == 1) for rank in range(3)]
    views = [tensor.detach().expand(2, 4).T for tensor in tensors]  # not contiguous
    with world(name, 3) as transports:
        for inputs in (tensors, views):
            results = on_all_ranks(
                transports, lambda t, inputs=inputs: all_reduce(t, inputs[t.rank])
            )  # type: ignore[misc]
            for result in results:
                assert not result.requires_grad
                result += 1  # nobody else's memory
            assert all(torch.equal(result, torch.full_like(result, 4.0)) for result in results)
            assert [float(tensor.detach().flatten()[0]) for tensor in inputs] == [0, 1, 2]


def test_a_world_of_one_gives_a_copy(name: str) -> None:
    with world(name, 1) as (transport,):
        tensor = torch.ones(3)
        result = all_reduce(transport, tensor)
        result += 1
        assert torch.equal(tensor, torch.ones(3))
        barrier(transport)


@pytest.mark.parametrize("world_size", SIZES)
def test_nobody_passes_a_barrier_early(name: str, world_size: int) -> None:
    arrived = [0] * world_size
    with world(name, world_size) as transports:

        def call(transport: Transport) -> None:
            for number in range(1, 21):
                arrived[transport.rank] = number
                barrier(transport, timeout=SOON_S)
                assert min(arrived) >= number and max(arrived) <= number + 1

        on_all_ranks(transports, call)


def test_calls_in_a_row_do_not_mix(name: str) -> None:
    """Ranks of very different speed, a hundred collectives without a pause, messages between."""
    with world(name, 4) as transports:

        def call(transport: Transport) -> None:
            rank, pace = transport.rank, random.Random(transport.rank)
            for number in range(100):
                if pace.random() < 0.05:
                    time.sleep(0.002)  # not a wait for anything: this rank is slow
                root = number % 4
                own = torch.tensor([number, root]) if rank == root else None
                assert broadcast(transport, own, root, timeout=SOON_S).tolist() == [number, root]  # type: ignore[union-attr]
                if number % 3 == 0:
                    transport.isend(torch.tensor(number), (rank + 1) % 4, tag=5)
                total = all_reduce(transport, torch.tensor(number * (rank + 1)), timeout=SOON_S)
                assert total.item() == number * 10
                if number % 3 == 0:
                    assert transport.recv((rank - 1) % 4, tag=5, timeout=SOON_S).item() == number
                if number % 7 == 0:
                    barrier(transport, timeout=SOON_S)

        on_all_ranks(transports, call)


def test_two_ranks_that_disagree_about_the_shape_are_told(name: str) -> None:
    with world(name, 2) as transports:
        first = start(lambda: all_reduce(transports[0], torch.ones(3), timeout=SOON_S))
        with pytest.raises(MessageMismatch) as caught:
            all_reduce(transports[1], torch.ones(4), timeout=SOON_S)
        assert "3" in str(caught.value) and "4" in str(caught.value)
        transports[1].abort(TransportClosed("over"))
        assert isinstance(first.exception(SOON_S), PeerLost)


def test_timeouts_are_kept(name: str) -> None:
    with world(name, 3) as transports:
        began = time.monotonic()
        with pytest.raises(WaitTimeout):
            barrier(transports[0], timeout=0.05)
        with pytest.raises(WaitTimeout):
            broadcast(transports[1], None, 2, timeout=0.05)
        assert time.monotonic() - began < 2.0


def test_the_loss_of_a_rank_ends_a_collective(name: str) -> None:
    with world(name, 3) as transports:
        waiting = [start(lambda t=t: barrier(t, timeout=SOON_S)) for t in transports[:2]]  # type: ignore[misc]
        gone = threading.Timer(0.0, lambda: transports[2].abort(TransportClosed("gone")))
        gone.start()
        assert isinstance(waiting[1].exception(SOON_S), PeerLost)
        transports[1].abort(TransportClosed("its rank failed"))
        assert isinstance(waiting[0].exception(SOON_S), PeerLost)
        gone.join()
