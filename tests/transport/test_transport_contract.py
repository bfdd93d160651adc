"""The contract of transport/base.py, rule by rule, on every transport."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transport_worlds as worlds
from transport_worlds import SOON_S, eventually, on_all_ranks, start

from transport.base import TAG_LIMIT, Transport, Work
from transport.errors import Failure as FailureRecord
from transport.errors import (
    InternalError,
    InvalidArgument,
    JobFailed,
    MessageMismatch,
    PeerLeft,
    PeerLost,
    ProtocolError,
    TransportClosed,
    WaitTimeout,
)
from transport.message.specs import MessageSpec, TensorSpec
from transport.message.tensors import memory, payload_sum
from transport.wire.format import FrameKind, Limits, encode

MIB = 1024 * 1024
LARGE = 16 * MIB  # more than the kernel holds of one connection
OVER_THE_STREAM = 64 * MIB  # float32: more than there is memory to lend, so that it has to wait
ON_GPU = [pytest.param(n, marks=pytest.mark.gpu) if "+cuda" in n else n for n in worlds.ON_GPU]
SOCKETS = [*worlds.SOCKETS, *(n for n in ON_GPU if "inproc" not in str(n))]
NAMES = [*worlds.NAMES, *ON_GPU]
sockets_only = pytest.mark.parametrize("name", SOCKETS)


def seeds(count: int, names: Sequence[Any] = NAMES) -> pytest.MarkDecorator:
    """Repeat a test with other random numbers; where it takes longest, once."""
    cases: list[Any] = []
    for name in names:
        if isinstance(name, str):
            many = name in worlds.NAMES and name != "gloo"
            cases += [(name, seed) for seed in range(count if many else 1)]
        else:
            cases.append(pytest.param(*name.values, 0, marks=name.marks))
    return pytest.mark.parametrize(("name", "seed"), cases)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(name: str) -> Iterator[list[Any]]:
    with worlds.world(name, 2) as transports:
        yield transports


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a thread or a descriptor behind."""
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    yield
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        after = (threading.active_count(), len(os.listdir("/proc/self/fd")))
        if after <= before and after[1] <= before[1]:
            return
        gc.collect()  # an exception's frames may still hold a received tensor
        time.sleep(0.005)
    assert after == before, [thread.name for thread in threading.enumerate()]


def number(value: int) -> torch.Tensor:
    return torch.tensor(value)


def get(transport: Any, src: int, tag: int = 0, **options: Any) -> torch.Tensor:
    result: torch.Tensor = transport.recv(src, tag, timeout=SOON_S, **options)
    return result


def blocked_receive(transport: Any, src: int, tag: int = 0) -> Any:
    """Start a thread that waits for a receive; return its future."""
    work = transport.irecv(src, tag)
    return start(lambda: work.wait(SOON_S))


# -- 1 order, 2 matching ---------------------------------------------------------------------------


def test_messages_of_one_tag_keep_their_order(pair: list[Any]) -> None:
    works = [pair[0].isend(number(i), 1, tag=5) for i in range(300)]
    assert [int(get(pair[1], 0, 5)) for _ in range(300)] == list(range(300))
    for work in works:
        assert work.wait(SOON_S) is None


@seeds(6)
def test_matching_in_any_order_of_sends_and_receives(name: str, seed: int) -> None:
    """The k-th receive of (src, tag) gets the k-th send of it, whatever lies between."""
    rng = random.Random(seed)
    with worlds.world(name, 3) as ranks:
        pairs = [(src, dst) for src in range(3) for dst in range(3) if src != dst]
        channels = [(src, dst, tag) for src, dst in pairs for tag in (0, 1, 2**40)]
        plan = [(rng.choice(channels), kind) for kind in "sr" * 1 for _ in range(150)]
        rng.shuffle(plan)
        sent = dict.fromkeys(channels, 0)
        receives: dict[tuple[int, int, int], list[Work]] = {channel: [] for channel in channels}
        values = {}
        for channel, kind in plan:
            src, dst, tag = channel
            if kind == "s":
                value = torch.full((rng.choice([1, 3, 20_000]),), rng.random())
                values[channel, sent[channel]] = value
                sent[channel] += 1
                ranks[src].isend(value, dst, tag)
            else:
                receives[channel].append(ranks[dst].irecv(src, tag))
        waits = [
            (channel, k)
            for channel in channels
            for k in range(min(sent[channel], len(receives[channel])))
        ]
        rng.shuffle(waits)
        for channel, k in waits:
            message = receives[channel][k].wait(SOON_S)
            assert isinstance(message, torch.Tensor)
            assert torch.equal(message, values[channel, k])
        for channel in channels:  # what has no counterpart has none
            assert not any(work.is_completed() for work in receives[channel][sent[channel] :])


def test_receive_posted_before_or_after_the_arrival(pair: list[Any]) -> None:
    early = pair[1].irecv(0, 1)
    assert not early.is_completed()
    pair[0].send(number(10), 1, 1, timeout=SOON_S)
    assert int(early.wait(SOON_S)) == 10
    pair[0].send(number(20), 1, 2, timeout=SOON_S)
    pair[0].send(number(30), 1, 3, timeout=SOON_S)
    assert int(get(pair[1], 0, 3)) == 30  # so tag 2 is here too, and nobody has asked for it
    late = pair[1].irecv(0, 2)
    assert late.is_completed()
    assert int(late.wait(0)) == 20


@pytest.mark.parametrize("early", [True, False])
def test_into_fills_that_memory(pair: list[Any], early: bool) -> None:
    target = (torch.zeros(3, 4), torch.zeros(0, 2), torch.zeros((), dtype=torch.int64))
    value = (torch.randn(3, 4), torch.zeros(0, 2), torch.tensor(9))
    pointers = [tensor.data_ptr() for tensor in target]
    if early:
        work = pair[1].irecv(0, into=target)
        pair[0].isend(value, 1)
    else:
        pair[0].isend(value, 1)
        pair[0].isend(number(0), 1, tag=1)
        get(pair[1], 0, 1)
        work = pair[1].irecv(0, into=target)
    message = work.wait(SOON_S)
    assert message is target
    assert [tensor.data_ptr() for tensor in message] == pointers
    for got, sent in zip(message, value, strict=True):
        assert torch.equal(got, sent)


def test_into_made_in_inference_mode(pair: list[Any]) -> None:
    with torch.inference_mode():
        targets = [torch.zeros(3), torch.zeros(3)]
    early = pair[1].irecv(0, 0, into=targets[0])
    pair[0].isend(torch.ones(3), 1, 0)
    pair[0].isend(torch.ones(3), 1, 1)
    pair[0].isend(number(1), 1, 2)
    early.wait(SOON_S)
    get(pair[1], 0, 2)
    pair[1].irecv(0, 1, into=targets[1]).wait(SOON_S)
    assert all(target.sum() == 3 for target in targets)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("stated", ["into", "expect"])
def test_a_mismatch_names_both_and_the_connection_goes_on(
    pair: list[Any], early: bool, stated: str
) -> None:
    def post() -> Any:
        if stated == "into":
            return pair[1].irecv(0, 1, into=torch.full((3,), 7.0))
        return pair[1].irecv(0, 1, expect=TensorSpec(torch.float32, (3,)))

    work = post() if early else None
    pair[0].isend(torch.zeros(2, 2, dtype=torch.int32), 1, 1)
    pair[0].isend(torch.ones(3), 1, 1)
    pair[0].isend(number(5), 1, 2)
    if work is None:
        get(pair[1], 0, 2)
        work = post()
    with pytest.raises(MessageMismatch, match=r"int32\[2, 2\].*float32\[3\]"):
        work.wait(SOON_S)
    if stated == "into":
        assert work.into.tolist() == [7, 7, 7]
    assert post().wait(SOON_S).tolist() == [1, 1, 1]


def test_expect_of_a_tuple(pair: list[Any]) -> None:
    message = (torch.ones(2), torch.zeros(0))
    pair[0].isend(message, 1)
    pair[0].isend(message, 1)
    got = pair[1].irecv(0, expect=MessageSpec.of(message)).wait(SOON_S)
    assert len(got) == 2
    with pytest.raises(MessageMismatch):
        pair[1].irecv(0, expect=TensorSpec.of(message[0])).wait(SOON_S)


@pytest.mark.parametrize("length", [0, 1, 2, 256])
def test_tuples(pair: list[Any], length: int) -> None:
    message = tuple(torch.full((i % 3, 2), float(i)) for i in range(length))
    pair[0].isend(message, 1)
    got = pair[1].irecv(0).wait(SOON_S)
    assert isinstance(got, tuple)
    assert len(got) == length
    assert all(torch.equal(a, b) for a, b in zip(got, message, strict=True))


def test_recv_of_a_tuple_says_what_to_do(pair: list[Any]) -> None:
    pair[0].isend((number(1),), 1)
    with pytest.raises(MessageMismatch, match="irecv"):
        get(pair[1], 0)


# -- 3 no wait for the peer, 4 ownership -----------------------------------------------------------


def test_isend_to_a_clogged_peer_returns_at_once(pair: list[Any]) -> None:
    """256 MiB nobody asks for: over every bound and every buffer of the kernel."""
    blocks = [torch.full((64 * MIB,), i, dtype=torch.uint8) for i in range(4)]
    begin = time.monotonic()
    works = [pair[0].isend(block, 1, tag=i) for i, block in enumerate(blocks)]
    assert time.monotonic() - begin < 2  # copies of inproc included
    for i in (3, 1, 2, 0):
        got = get(pair[1], 0, i)
        assert got.numel() == 64 * MIB
        assert got[0] == got[-1] == i
    for work in works:
        work.wait(SOON_S)


def test_neighbours_that_send_much_before_they_receive(pair: list[Any]) -> None:
    def exchange(transport: Any) -> bool:
        mine = torch.full((LARGE,), transport.rank, dtype=torch.uint8)
        work = transport.isend(mine, 1 - transport.rank)
        got = get(transport, 1 - transport.rank)
        work.wait(SOON_S)
        return bool((got == 1 - transport.rank).all())

    assert on_all_ranks(pair, exchange) == [True, True]


@pytest.mark.parametrize("nbytes", [1, 3000, 3 * MIB])
def test_changes_after_wait_do_not_reach_the_receiver(pair: list[Any], nbytes: int) -> None:
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    receives = [pair[1].irecv(0) for _ in range(10)]
    for i in range(10):
        tensor.fill_(i)
        pair[0].isend(tensor, 1).wait(SOON_S)
        tensor.fill_(99)
    for i, work in enumerate(receives):
        assert (work.wait(SOON_S) == i).all()


def test_a_tensor_that_nobody_else_holds_lives_until_it_is_sent(pair: list[Any]) -> None:
    for i in range(8):
        pair[0].isend(torch.full((4 * MIB,), i, dtype=torch.uint8).t(), 1)
        gc.collect()
    assert all((get(pair[1], 0) == i).all() for i in range(8))


def test_received_tensors_are_not_shared(pair: list[Any]) -> None:
    original = torch.zeros(4)
    pair[0].isend(original, 1).wait(SOON_S)
    get(pair[1], 0).fill_(1)
    assert original.sum() == 0


def test_received_tensors_can_be_trained_on(pair: list[Any]) -> None:
    """Also when the thread that moved their bytes was in inference mode."""
    pair[0].isend(torch.ones(3), 1, 1)
    pair[0].isend(number(0), 1, 2)
    with torch.inference_mode():
        get(pair[1], 0, 2)
    x = get(pair[1], 0, 1).requires_grad_()
    (x * x).sum().backward()
    assert x.grad is not None


# -- 6 threads -------------------------------------------------------------------------------------


def test_many_threads_wait_on_one_transport(name: str) -> None:
    with worlds.world(name, 3) as ranks:
        receives = [ranks[0].irecv(1 + i % 2, i) for i in range(40)]
        waiting = [start(lambda w=w: int(w.wait(SOON_S))) for w in receives]  # type: ignore[misc]
        order = list(range(40))
        random.Random(1).shuffle(order)
        for i in order:
            ranks[1 + i % 2].isend(number(i), 0, i)
        assert [future.result(SOON_S) for future in waiting] == list(range(40))


def test_one_work_waited_for_by_many_threads(pair: list[Any]) -> None:
    work = pair[0].irecv(1)
    waiting = [start(lambda: int(work.wait(SOON_S))) for _ in range(8)]
    pair[1].isend(number(3), 0)
    assert [future.result(SOON_S) for future in waiting] == [3] * 8


@seeds(3)
def test_threads_that_send_and_receive_at_once(name: str, seed: int) -> None:
    """Drivers, followers and the background thread change places all the time."""
    threads, rounds = 6, 60
    with worlds.world(name, 2) as ranks:

        def talk(transport: Any, tag: int) -> int:
            rng = random.Random(seed * 100 + tag + 50 * transport.rank)
            total = 0
            for i in range(rounds):
                size = rng.choice([1, 1, 1000, 100_000])
                work = transport.isend(torch.full((size,), float(i)), 1 - transport.rank, tag)
                if rng.random() < 0.2:
                    time.sleep(rng.random() * 0.002)
                got = get(transport, 1 - transport.rank, tag)
                assert (got == i).all()
                total += 1
                if rng.random() < 0.5:
                    work.wait(SOON_S)
            return total

        futures = [
            start(lambda r=rank, t=tag: talk(r, t))  # type: ignore[misc]
            for rank in ranks
            for tag in range(threads)
        ]
        assert [future.result(SOON_S) for future in futures] == [rounds] * (2 * threads)


def test_bytes_move_while_nobody_waits(pair: list[Any]) -> None:
    target = torch.zeros(32 * MIB, dtype=torch.uint8)
    work = pair[1].irecv(0, into=target)
    sending = pair[0].isend(torch.ones(32 * MIB, dtype=torch.uint8), 1)
    eventually(lambda: work.is_completed() and sending.is_completed())
    work.wait(0)
    assert target.sum() == 32 * MIB


def test_short_waits_interrupted_by_timeouts_lose_nothing(pair: list[Any]) -> None:
    def sender() -> None:
        for i in range(200):
            pair[0].isend(number(i), 1).wait(SOON_S)
            time.sleep(0.0005)

    sending = start(sender)
    for i in range(200):
        work = pair[1].irecv(0)
        deadline = time.monotonic() + SOON_S
        while True:
            try:
                assert int(work.wait(0.0002)) == i
                break
            except WaitTimeout:
                assert time.monotonic() < deadline
    sending.result(SOON_S)


# -- wrong calls, timeouts -------------------------------------------------------------------------


@pytest.mark.parametrize("peer", [0, -1, 2, 1.0, True, None, "1"])
def test_bad_ranks(pair: list[Any], peer: Any) -> None:
    for call in (lambda: pair[0].isend(number(1), peer), lambda: pair[0].irecv(peer)):
        with pytest.raises(InvalidArgument, match="rank"):
            call()


@pytest.mark.parametrize("tag", [TAG_LIMIT, -TAG_LIMIT - 1, 1.0, True, None, "1"])
def test_bad_tags(pair: list[Any], tag: Any) -> None:
    for call in (lambda: pair[0].isend(number(1), 1, tag), lambda: pair[0].irecv(1, tag)):
        with pytest.raises(InvalidArgument, match="tag"):
            call()


def test_bad_messages_and_expectations(pair: list[Any]) -> None:
    for message in (1, None, [number(1)], (number(1), 1), torch.zeros(1, device="meta")):
        with pytest.raises(InvalidArgument):
            pair[0].isend(message, 1)
    wrong: list[dict[str, Any]] = [
        {"into": 3},
        {"into": [torch.zeros(2)]},
        {"into": (torch.zeros(2), None)},
        {"into": torch.zeros(2, 2).t()[:1].t()[::2].expand(3, 1)},
        {"into": torch.zeros(2, requires_grad=True)},
        {"expect": "float32[3]"},
        {"expect": torch.zeros(3)},
        {"into": torch.zeros(2), "expect": TensorSpec(torch.float32, (3,))},
    ]
    for options in wrong:
        with pytest.raises(InvalidArgument):
            pair[1].irecv(0, **options)
    pair[0].isend(number(4), 1)
    assert int(get(pair[1], 0)) == 4


@sockets_only
def test_what_the_peer_would_refuse_is_refused_here(name: str) -> None:
    limits = Limits(meta_nbytes=200, payload_nbytes=1000)
    with worlds.world(name, 2, limits=limits) as ranks:
        with pytest.raises(InvalidArgument, match="1001 bytes"):
            ranks[0].isend(torch.zeros(1001, dtype=torch.uint8), 1)
        with pytest.raises(InvalidArgument, match="metadata"):
            ranks[0].isend((number(1),) * 100, 1)
        ranks[0].isend(number(7), 1)
        assert int(get(ranks[1], 0)) == 7


@pytest.mark.parametrize("timeout", [0, 0.02, -1])
def test_a_wait_that_timed_out_can_be_repeated(pair: list[Any], timeout: float) -> None:
    work = pair[1].irecv(0)
    for _ in range(2):
        begin = time.monotonic()
        with pytest.raises(WaitTimeout, match=r"rank 0 with tag 0"):
            work.wait(timeout)
        assert time.monotonic() - begin < 1
    with pytest.raises(TimeoutError):
        pair[1].irecv(0, 9).wait(timeout)
    pair[0].isend(number(8), 1)
    assert int(work.wait(SOON_S)) == 8
    assert work.is_completed()
    assert int(work.wait(0)) == 8


@sockets_only
def test_a_send_that_timed_out_can_be_waited_for_again(name: str) -> None:
    with worlds.world(name, 2, unexpected_limit=MIB) as ranks:
        work = ranks[0].isend(torch.ones(LARGE, dtype=torch.uint8), 1)
        with pytest.raises(WaitTimeout, match="sending to rank 1"):
            work.wait(0.05)
        assert not work.is_completed()
        receiving = blocked_receive(ranks[1], 0)
        work.wait(SOON_S)
        assert receiving.result(SOON_S).sum() == LARGE


# -- 5 bounded memory ------------------------------------------------------------------------------


SMALL = 16 * 1024  # a message that goes over the stream on every socket transport
FLOOD = 1600  # such messages: 25 MiB, more than the bound and what the kernel holds


@sockets_only
def test_a_flood_that_nobody_asked_for_stops_being_read(name: str) -> None:
    limit = MIB
    with worlds.world(name, 3, unexpected_limit=limit) as ranks:
        flood = [ranks[1].isend(torch.full((SMALL,), i).byte(), 0, 7) for i in range(FLOOD)]
        asked = torch.zeros(3 * MIB, dtype=torch.uint8)
        eventually(lambda: ranks[0]._mailbox.held_nbytes(1) > limit - SMALL)
        time.sleep(0.05)
        assert ranks[0]._mailbox.held_nbytes(1) <= limit
        assert not flood[-1].is_completed()

        # Another peer's traffic flows, though only the background thread reads it ...
        other = ranks[0].irecv(2, 1, into=asked)
        ranks[2].isend(torch.ones(3 * MIB, dtype=torch.uint8), 0, 1)
        eventually(other.is_completed)
        assert ranks[0]._mailbox.held_nbytes(1) <= limit
        # ... what was asked for goes on past the bound, message by message ...
        receives = [ranks[0].irecv(1, 7) for _ in range(100)]
        eventually(lambda: all(work.is_completed() for work in receives))
        assert ranks[0]._mailbox.held_nbytes(1) <= limit
        assert [int(work.wait(0)[0]) for work in receives] == list(range(100))
        # ... and while this rank waits for a receive, it reads on, for to stop could deadlock.
        ranks[1].isend(number(5), 0, 8)
        assert int(get(ranks[0], 1, 8)) == 5
        assert ranks[0]._mailbox.held_nbytes(1) == (FLOOD - 100) * SMALL
        for i in range(100, FLOOD):
            assert int(get(ranks[0], 1, 7)[0]) == i % 256
        assert ranks[0]._mailbox.held_nbytes(1) == 0
        for work in flood:
            work.wait(SOON_S)


def quiet() -> bool:
    """Whether this process does next to nothing for a while."""
    before = time.process_time()
    time.sleep(0.15)
    return time.process_time() - before < 0.05


@sockets_only
def test_a_clogged_connection_does_not_keep_a_processor_busy(name: str) -> None:
    """Neither while both sides live, nor after the flooding one has died (EPOLLHUP)."""
    with worlds.world(name, 2, unexpected_limit=1000) as ranks:
        ranks[1].isend(torch.zeros(LARGE), 0)
        ranks[0].isend(torch.zeros(OVER_THE_STREAM), 1)
        eventually(lambda: ranks[0]._peers[1].pending is not None)
        eventually(lambda: ranks[1]._peers[0].pending is not None)
        assert quiet()
        ranks[1].abort(TransportClosed("dead"))
        eventually(lambda: ranks[0]._peers[1].ended is not None)
        eventually(quiet)  # (the memory of what was on its way may have to be freed first)


@seeds(2, SOCKETS)
def test_tight_bounds_do_not_deadlock_or_reorder(name: str, seed: int) -> None:
    """Everyone floods everyone; reading stops and goes on all the time."""
    with worlds.world(name, 3, unexpected_limit=5000) as ranks:

        def run(transport: Any) -> None:
            rng = random.Random(seed + 10 * transport.rank)
            others = [rank for rank in range(3) if rank != transport.rank]
            works = [
                transport.isend(torch.full((rng.choice([1, 999, 30_000]),), i).short(), dst, tag)
                for i in range(40)
                for dst in others
                for tag in (0, 1)
            ]
            order = [(src, tag) for src in others for tag in (0, 1)] * 40
            rng.shuffle(order)
            seen = dict.fromkeys(order, 0)
            for src, tag in order:
                if rng.random() < 0.1:
                    time.sleep(0.001)
                assert int(get(transport, src, tag)[0]) == seen[src, tag]
                seen[src, tag] += 1
            for work in works:
                work.wait(SOON_S)

        on_all_ranks(ranks, run)


# -- 7 failure -------------------------------------------------------------------------------------


def test_abort_wakes_every_waiter_with_its_error(name: str) -> None:
    failure = FailureRecord(rank=2, cause="signal", message="killed by SIGKILL", signal=9)
    error = JobFailed(failure)
    with worlds.world(name, 3) as ranks:
        get_one = start(lambda: get(ranks[0], 1, 99))
        ranks[1].send(number(1), 0, 99, timeout=SOON_S)
        get_one.result(SOON_S)
        waiting = [blocked_receive(ranks[0], 1 + i % 2, i) for i in range(10)]
        time.sleep(0.02)
        begin = time.monotonic()
        ranks[0].abort(error)
        for i, future in enumerate(waiting):
            caught = future.exception(SOON_S)
            assert isinstance(caught, JobFailed)
            assert caught.failure == failure
            assert caught.doing == f"waiting for a message from rank {1 + i % 2} with tag {i}"
        assert time.monotonic() - begin < 1
        ranks[0].abort(TransportClosed("another"))  # the first error stays
        for call in (lambda: ranks[0].isend(number(1), 1), lambda: ranks[0].irecv(1)):
            with pytest.raises(JobFailed, match="SIGKILL"):
                call()
        ranks[0].close(SOON_S)


def test_an_error_is_raised_as_a_new_object_in_each_thread(pair: list[Any]) -> None:
    """One object raised twice would mix tracebacks, and keep the frames of the first alive."""
    works = [pair[0].irecv(1, i) for i in range(2)]
    error = JobFailed(FailureRecord(rank=1, cause="exit", message="gone"))
    error.__cause__ = KeyError("reason")
    pair[0].abort(error)
    caught = []
    for work in works:
        with pytest.raises(JobFailed) as info:
            work.wait(SOON_S)
        caught.append(info.value)
    assert caught[0] is not caught[1]
    assert error.__traceback__ is None
    assert isinstance(caught[0].__cause__, KeyError)


def test_abort_races_with_everything(name: str) -> None:
    """Whatever the others do at that moment, they get the error, and nothing hangs."""
    rng = random.Random(5)
    for _ in range(5 if name == "gloo" else 25):
        with worlds.world(name, 2) as ranks:

            def talk(transport: Any) -> str:
                try:
                    for _ in range(100_000):
                        transport.isend(torch.zeros(2000), 1 - transport.rank)
                        get(transport, 1 - transport.rank)
                except (JobFailed, PeerLost) as error:
                    return type(error).__name__
                return "never"

            futures = [start(lambda r=r: talk(r)) for r in ranks for _ in range(2)]  # type: ignore[misc]
            time.sleep(rng.random() * 0.01)
            ranks[0].abort(JobFailed(FailureRecord(rank=0, cause="exit", message="over")))
            results = [future.result(SOON_S) for future in futures]
            assert results[:2] == ["JobFailed"] * 2
            assert set(results[2:]) <= {"PeerLost", "JobFailed"}  # or the cause, where it is known


def test_peer_that_aborts_is_lost_to_the_others(name: str) -> None:
    with worlds.world(name, 3) as ranks:
        ranks[1].send(number(6), 0, 1, timeout=SOON_S)
        assert int(get(ranks[0], 1, 1)) == 6
        waiting = [blocked_receive(ranks[0], 1, i) for i in range(3)]
        third = blocked_receive(ranks[0], 2, 0)
        ranks[1].abort(TransportClosed("crashed"))
        for future in waiting:
            assert isinstance(future.exception(SOON_S), PeerLost)
        for call in (
            lambda: ranks[0].isend(number(1), 1),
            lambda: ranks[0].irecv(1).wait(SOON_S),
            lambda: get(ranks[0], 1, 5),
        ):
            with pytest.raises(PeerLost, match="rank 1"):
                call()
        ranks[2].isend(number(2), 0)  # the others go on
        assert int(third.result(SOON_S)) == 2


@sockets_only
def test_a_lost_peer_fails_sends_to_it_also_when_reading_had_stopped(name: str) -> None:
    with worlds.world(name, 2, unexpected_limit=1000) as ranks:
        ranks[1].isend(torch.zeros(LARGE), 0)
        sending = ranks[0].isend(torch.zeros(OVER_THE_STREAM), 1)
        eventually(lambda: ranks[0]._peers[1].pending is not None)
        waiting = start(lambda: sending.wait(SOON_S))
        time.sleep(0.02)
        ranks[1].abort(TransportClosed("crashed"))
        assert isinstance(waiting.exception(SOON_S), PeerLost)


@sockets_only
def test_the_grace_leaves_time_to_name_the_cause(name: str) -> None:
    with worlds.world(name, 2, lost_grace_s=0.4) as ranks:
        ranks[1].send(number(1), 0, timeout=SOON_S)
        get(ranks[0], 1)
        waiting = blocked_receive(ranks[0], 1)
        ranks[1].abort(TransportClosed("crashed"))
        eventually(lambda: ranks[0]._peers[1].lost)
        late = blocked_receive(ranks[0], 1, 4)
        sending = ranks[0].isend(number(1), 1)
        assert not sending.is_completed()
        ranks[0].abort(JobFailed(FailureRecord(rank=1, cause="exit", message="crashed")))
        for future in (waiting, late):
            assert isinstance(future.exception(SOON_S), JobFailed)
        with pytest.raises(JobFailed):
            sending.wait(0)

    with worlds.world(name, 2, lost_grace_s=0.05) as ranks:  # and without a cause it ends as well
        ranks[1].send(number(1), 0, timeout=SOON_S)
        get(ranks[0], 1)
        waiting = blocked_receive(ranks[0], 1)
        ranks[1].abort(TransportClosed("crashed"))
        assert isinstance(waiting.exception(SOON_S), PeerLost)
        with pytest.raises(PeerLost):
            ranks[0].isend(number(1), 1)


@sockets_only
def test_a_handler_that_breaks_ends_the_transport_with_a_named_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the background thread nor a waiting one may swallow it, or die of it in silence."""
    for background in (True, False):
        with worlds.world(name, 3) as ranks:
            waiting = [ranks[0].irecv(2, i) for i in range(3)]

            def broken(*_: object) -> None:
                raise ZeroDivisionError("a bug")

            monkeypatch.setattr(ranks[0]._mailbox, "complete", broken)
            futures = [] if background else [start(lambda w=w: w.wait(SOON_S)) for w in waiting]  # type: ignore[misc]
            ranks[1].isend(number(1), 0)
            if background:
                eventually(lambda: all(work.is_completed() for work in waiting))  # noqa: B023
                futures = [start(lambda w=w: w.wait(SOON_S)) for w in waiting]  # type: ignore[misc]
            for future in futures:
                error = future.exception(SOON_S)
                assert isinstance(error, InternalError)
                assert "ZeroDivisionError: a bug" in str(error)
                assert isinstance(error.__cause__, ZeroDivisionError)
            with pytest.raises(InternalError):
                ranks[0].isend(number(1), 1)
            ranks[0].close(SOON_S)


@pytest.mark.parametrize("name", list(worlds.SOCKETS))
def test_no_memory_for_a_message_fails_the_receive_that_it_was_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    for asked in (True, False):
        with worlds.world(name, 3) as ranks:
            work = ranks[0].irecv(1) if asked else None
            with monkeypatch.context() as patch:
                patch.setattr(MessageSpec, "allocate", no_memory)
                ranks[1].isend(torch.zeros(100), 0)
                eventually(lambda: 1 in ranks[0]._peers and ranks[0]._peers[1].ended is not None)
            work = work or ranks[0].irecv(1)
            with pytest.raises(Exception, match="no memory for float32"):
                work.wait(SOON_S)
            ranks[2].isend(number(3), 0)
            assert int(get(ranks[0], 2)) == 3


# -- 8 end -----------------------------------------------------------------------------------------


def test_a_peer_that_closes_has_left_but_its_messages_are_here(pair: list[Any]) -> None:
    for i in range(50):
        pair[0].isend(torch.full((1000,), i), 1, i % 2)
    waiting = blocked_receive(pair[1], 0, 5)
    pair[0].close(SOON_S)
    assert isinstance(waiting.exception(SOON_S), PeerLeft)
    for i in range(50):
        assert int(get(pair[1], 0, i % 2)[0]) == i
    for call in (lambda: get(pair[1], 0, 0), lambda: pair[1].isend(number(1), 0)):
        with pytest.raises(PeerLeft, match="rank 0 has left"):
            call()


@sockets_only
def test_a_goodbye_behind_a_flood_is_still_a_goodbye(name: str) -> None:
    """The reader had stopped, so that only a failing write tells it of the end: read on first."""
    if name == "gloo":
        pytest.skip("a payload leaves over gloo when its receiver takes it: close waits for that")
    with worlds.world(name, 2, unexpected_limit=1000) as ranks:
        for i in range(20):
            ranks[0].isend(torch.full((500,), i), 1)
        eventually(lambda: 0 in ranks[1]._peers and ranks[1]._peers[0].pending)
        ranks[0].close(SOON_S)
        try:
            sending = ranks[1].isend(torch.zeros(OVER_THE_STREAM), 0)
            with pytest.raises(PeerLeft):
                sending.wait(SOON_S)
        except PeerLeft:
            pass
        for i in range(20):
            assert int(get(ranks[1], 0)[0]) == i


@pytest.mark.parametrize("backwards", [False, True])
def test_close_sends_everything_first(pair: list[Any], backwards: bool) -> None:
    """Also when the closing rank leaves unread what the other had sent: no reset may hurt it."""
    blocks = [torch.full((8 * MIB,), i, dtype=torch.uint8) for i in range(8)]
    if backwards:
        for _ in range(3):
            pair[1].isend(torch.zeros(LARGE, dtype=torch.uint8), 0)
    for block in blocks:
        pair[0].isend(block, 1)
    closing = start(lambda: pair[0].close(SOON_S))
    if not backwards:
        eventually(closing.done) if pair[0].name == "inproc" else time.sleep(0.02)
    for i in range(8):
        got = get(pair[1], 0)
        assert got[0] == got[-1] == i
    assert closing.result(SOON_S) is None
    with pytest.raises(PeerLeft):
        get(pair[1], 0)


@seeds(3)
def test_everybody_closes_at_once_and_nothing_is_lost(name: str, seed: int) -> None:
    """Each sends, receives all and closes; whoever is later must not miss what was sent to it."""
    rng = random.Random(seed)
    for _ in range(10):
        sizes = {(a, b): rng.choice([1, 5000, 400_000]) for a in range(3) for b in range(3)}
        delays = [rng.random() * 0.01 for _ in range(3)]
        with worlds.world(name, 3) as ranks:

            def run(transport: Any) -> bool:
                me = transport.rank
                others = [rank for rank in range(3) if rank != me]
                for other in others:
                    transport.isend(torch.full((50_000,), me), other, 1)  # nobody asks for it
                    transport.isend(torch.full((sizes[me, other],), me), other)  # noqa: B023
                time.sleep(delays[me])  # noqa: B023
                received = {other: get(transport, other) for other in others}
                ok = all(
                    got.shape == (sizes[other, me],) and bool((got == other).all())  # noqa: B023
                    for other, got in received.items()
                )
                transport.close(SOON_S)
                return ok

            assert on_all_ranks(ranks, run) == [True] * 3


@sockets_only
def test_close_with_a_timeout(name: str) -> None:
    with worlds.world(name, 2, unexpected_limit=1000) as ranks:
        ranks[0].isend(torch.zeros(LARGE), 1)
        waiting = blocked_receive(ranks[0], 1)
        with pytest.raises(WaitTimeout, match=r"ranks \[1\] did not take"):
            ranks[0].close(0.05)
        assert isinstance(waiting.exception(SOON_S), TransportClosed)
        with pytest.raises(TransportClosed):
            ranks[0].isend(number(1), 1)


def test_close_twice_and_calls_after_it(pair: list[Any]) -> None:
    pair[0].isend(number(1), 1)
    mine = pair[0].irecv(1)
    for _ in range(3):
        pair[0].close(SOON_S)
    pair[0].abort(TransportClosed("again"))
    with pytest.raises(TransportClosed):
        mine.wait(SOON_S)
    for call in (lambda: pair[0].isend(number(1), 1), lambda: pair[0].irecv(1)):
        with pytest.raises(TransportClosed, match="has closed"):
            call()
    assert int(get(pair[1], 0)) == 1


@sockets_only
def test_nothing_is_taken_on_while_close_still_flushes(name: str) -> None:
    with worlds.world(name, 2, unexpected_limit=1000) as ranks:
        ranks[0].isend(torch.ones(LARGE, dtype=torch.uint8), 1)
        mine = ranks[0].irecv(1)
        closing = start(lambda: ranks[0].close(SOON_S))
        eventually(lambda: ranks[0]._farewell is not None)
        for call in (lambda: ranks[0].isend(number(1), 1), lambda: ranks[0].irecv(1)):
            with pytest.raises(TransportClosed):
                call()
        assert not mine.is_completed()
        assert get(ranks[1], 0).sum() == LARGE
        assert closing.result(SOON_S) is None
        with pytest.raises(TransportClosed):
            mine.wait(SOON_S)
        with pytest.raises(PeerLeft):
            get(ranks[1], 0)


@sockets_only
def test_an_abort_during_close_is_what_close_raises(name: str) -> None:
    with worlds.world(name, 2, unexpected_limit=1000) as ranks:
        ranks[0].isend(torch.ones(LARGE), 1)
        closing = start(lambda: ranks[0].close(SOON_S))
        eventually(lambda: ranks[0]._farewell is not None)
        ranks[0].abort(JobFailed(FailureRecord(rank=1, cause="exit", message="gone")))
        assert isinstance(closing.exception(SOON_S), JobFailed)


def test_many_threads_close_at_once(name: str) -> None:
    for _ in range(10):
        with worlds.world(name, 2) as ranks:
            ranks[0].isend(torch.zeros(100_000), 1)
            closing = [start(lambda r=r: r.close(SOON_S)) for r in ranks * 3]  # type: ignore[misc]
            closing += [start(lambda r=r: r.abort(TransportClosed("x"))) for r in ranks]  # type: ignore[misc]
            for future in closing:
                assert isinstance(future.exception(SOON_S), TransportClosed | None)


def test_a_world_that_never_spoke_closes_at_once(name: str) -> None:
    with worlds.world(name, 4) as ranks:
        begin = time.monotonic()
        for rank in ranks:
            rank.close(SOON_S)
        assert time.monotonic() - begin < 2


# -- first contact, and everything together --------------------------------------------------------


@seeds(3)
def test_simultaneous_first_contact(name: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        delays = [rng.choice([0, 0, 0.0005, 0.002]) for _ in range(4)]
        with worlds.world(name, 4) as ranks:
            gate = threading.Barrier(4)

            def meet(transport: Any) -> list[list[int]]:
                others = [rank for rank in range(4) if rank != transport.rank]
                gate.wait(SOON_S)  # noqa: B023
                time.sleep(delays[transport.rank])  # noqa: B023
                for i in range(3):
                    for other in others:
                        transport.isend(number(10 * transport.rank + i), other)
                return [[int(get(transport, other)) for _ in range(3)] for other in others]

            for rank, got in enumerate(on_all_ranks(ranks, meet)):
                others = [other for other in range(4) if other != rank]
                assert got == [[10 * other + i for i in range(3)] for other in others]
            if not name.startswith("inproc"):
                connected = [
                    (rank.rank, other)
                    for rank in ranks
                    for other, peer in rank._peers.items()
                    if peer.socket is not None
                ]
                assert len(connected) == len(set(connected)) == 12


@seeds(2)
def test_all_to_all_with_checksums(name: str, seed: int) -> None:
    def content(src: int, dst: int, tag: int, i: int) -> torch.Tensor:
        rng = random.Random(f"{seed} {src} {dst} {tag} {i}")
        tensor = torch.empty(rng.choice([0, 1, 100, 70_000, 300_000]), dtype=torch.uint8)
        memory(tensor)[:] = rng.randbytes(tensor.numel())
        return tensor

    def run(transport: Any) -> int:
        me = transport.rank
        rng = random.Random(seed * 10 + me)
        posts = [(kind, o, t) for kind in "sr" for o in range(5) if o != me for t in (0, 1)] * 6
        rng.shuffle(posts)
        count: dict[tuple[str, int, int], int] = {}
        works: list[tuple[Work, torch.Tensor | None]] = []
        for kind, other, tag in posts:
            i = count.get((kind, other, tag), 0)
            count[kind, other, tag] = i + 1
            if kind == "s":
                works.append((transport.isend(content(me, other, tag, i), other, tag), None))
            else:
                works.append((transport.irecv(other, tag), content(other, me, tag, i)))
        rng.shuffle(works)
        for work, expected in works:
            message = work.wait(SOON_S)
            if expected is not None:
                assert isinstance(message, torch.Tensor)
                assert torch.equal(message, expected)
        transport.close(SOON_S)
        return len(works)

    options = {} if name == "inproc" else {"unexpected_limit": 100_000}
    with worlds.world(name, 5, **options) as ranks:
        assert on_all_ranks(ranks, run) == [96] * 5


# -- a receive that timed out is taken back --------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [False, True], ids=["fresh", "into"])
def test_a_recv_that_timed_out_leaves_the_message_to_the_next_one(name: str, given: bool) -> None:
    with worlds.world(name, 2) as (one, other):
        into = torch.zeros(2)
        with pytest.raises(WaitTimeout):
            one.recv(1, into=into if given else None, timeout=0.01)
        waiting = one.irecv(1)  # the first that asks now
        other.send(torch.tensor([7.0, 8.0]), 0)
        other.send(torch.tensor([9.0, 9.0]), 0)
        assert waiting.wait(worlds.SOON_S).tolist() == [7, 8]
        assert one.recv(1, timeout=worlds.SOON_S).tolist() == [9, 9]
        assert into.tolist() == [0, 0]


@pytest.mark.parametrize("name", SOCKETS)
@pytest.mark.parametrize("given", [False, True], ids=["fresh", "into"])
@pytest.mark.parametrize("next_waits", [False, True])
def test_a_recv_that_timed_out_in_the_midst_of_its_message(
    name: str, given: bool, next_waits: bool
) -> None:
    with worlds.world(name, 2) as (one, other):
        size = 8 * 2**20
        into = torch.zeros(size, dtype=torch.uint8)
        receive = one.irecv(1, into=into if given else None)
        other.send(torch.zeros(0), 0, 5)  # so that both are connected
        one.recv(1, 5, timeout=worlds.SOON_S)
        sock = other._peers[0].socket
        spec = MessageSpec.of(torch.ones(size, dtype=torch.uint8))
        head = encode(FrameKind.MESSAGE, 1, spec.packed, size)
        sock.setblocking(True)
        sock.sendall(head + b"\1" * 1000)
        worlds.eventually(lambda: one._peers[1].arriving is not None)
        later = one.irecv(1) if next_waits else None
        assert one.withdraw(receive)
        sock.sendall(b"\1" * (size - 1000))
        arrived = (later or one.irecv(1)).wait(worlds.SOON_S)
        assert bool((arrived == 1).all())
        assert arrived.data_ptr() != into.data_ptr()
        assert not receive.is_completed()


def test_two_ranks_that_send_more_than_the_bound_before_they_receive_do_not_deadlock() -> None:
    with worlds.world("unix", 2, unexpected_limit=1000) as transports:
        big = torch.ones(16 * 2**20, dtype=torch.uint8)

        def swap(transport: Transport) -> int:
            peer = 1 - transport.rank
            transport.send(big, peer, timeout=worlds.SOON_S)
            return int(transport.recv(peer, timeout=worlds.SOON_S).sum())

        assert worlds.on_all_ranks(transports, swap) == [16 * 2**20] * 2


@pytest.mark.parametrize("name", SOCKETS)
def test_a_payload_that_changes_on_its_way_is_an_error_when_sums_are_on(name: str) -> None:
    with worlds.world(name, 2, checksum=True) as (one, other):
        for tensors in (torch.arange(5, dtype=torch.int8), (torch.zeros(9), torch.ones(0))):
            other.send(tensors, 0)
            arrived = one.irecv(1).wait(worlds.SOON_S)
            assert MessageSpec.of(arrived) == MessageSpec.of(tensors)
        victim = torch.ones(3_000_001, dtype=torch.int8)
        into = torch.empty_like(victim)
        receive = one.irecv(1, 7, into=into)
        true_sum = payload_sum([victim])
        victim[2_999_999] ^= 0x40  # a bit of the wire
        spec = MessageSpec.of(victim)
        connection = other._peers[0]
        with other._lock:
            connection.queue(
                FrameKind.SUMMED, spec.packed, spec.nbytes, [victim], tag=7, word=true_sum
            )
        with pytest.raises(ProtocolError, match=r"from rank 1: the payload's sum .* tag 7"):
            receive.wait(worlds.SOON_S)
        with pytest.raises(ProtocolError, match="from rank 1"):
            one.irecv(1).wait(worlds.SOON_S)
