"""GPU tensors over streams: order of streams, where each part comes to lie, and every error.

The GPU is the one of fake_gpu.py. Each test of an order fails when the wait that it is about is
taken out of gpu_stager.py or gpu_mailbox.py: its numbers are wrong then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transport_worlds as worlds
from fake_gpu import POISON, FakeGpu
from transport_worlds import SOON_S, distinct, eventually, start

from transport.errors import (
    DeviceError,
    InvalidArgument,
    MessageMismatch,
    PeerLost,
    ProtocolError,
    TransportClosed,
    WaitTimeout,
)
from transport.message import specs as metadata
from transport.message.specs import MessageSpec, TensorSpec
from transport.message.tensors import prepare
from transport.wire.format import Limits, pack

STREAMS = ["tcp", "unix", "shm", "gloo"]
streams_only = pytest.mark.parametrize("name", STREAMS)  # where a send is copied by a thread
BIG = 300_000
LATE_S = 0.01


@pytest.fixture(params=[*STREAMS, "cuda_ipc"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(name: str) -> Iterator[list[Any]]:
    with worlds.world(name, 2, gpus=[FakeGpu(1, LATE_S), FakeGpu(2, LATE_S)]) as ranks:
        if name == "cuda_ipc":  # the first message of each direction is staged
            for src, dst in ((0, 1), (1, 0)):
                ranks[src].isend(on(ranks[src], 0, 1), dst)
                ranks[dst].recv(src, timeout=SOON_S)
            ranks[0].gpu.copies.clear()
        yield ranks


def on(rank: Any, value: float, size: int = BIG) -> torch.Tensor:
    """Return a tensor on a rank's GPU that gets its value late."""
    return rank.gpu.upload(torch.full((size,), float(value)))


def values(rank: Any, tensor: torch.Tensor) -> list[float]:
    """Return the values, each once, that the current stream finds in a tensor."""
    assert rank.gpu.holds(tensor)
    return distinct(rank.gpu.download(tensor))


# -- the order of streams --------------------------------------------------------------------------


def test_what_is_sent_is_what_the_stream_had_come_to(pair: list[Any]) -> None:
    tensor = on(pair[0], 1)
    for i in range(10):
        pair[0].gpu.fill(tensor, i)
        pair[0].isend(tensor, 1).wait(SOON_S)
        pair[0].gpu.fill(tensor, 99)
    assert [values(pair[1], pair[1].recv(0, timeout=SOON_S)) for _ in range(10)] == [
        [i] for i in range(10)
    ]


def test_a_received_tensor_may_be_used_at_once(pair: list[Any]) -> None:
    for i in range(10):
        pair[0].isend(on(pair[0], i), 1)
        assert values(pair[1], pair[1].recv(0, timeout=SOON_S)) == [i]


@pytest.mark.parametrize("early", [True, False])
def test_into_is_filled_after_what_the_stream_was_given_before(
    pair: list[Any], early: bool
) -> None:
    gpu = pair[1].gpu
    for i in range(6):
        into = on(pair[1], -i)
        if not early:
            pair[0].isend(on(pair[0], i), 1)
            eventually(lambda: pair[1]._mailbox.held_nbytes(0) > 0)
        seen = gpu.empty(into)
        gpu.copy(seen, into, gpu.current())  # still to come when `into` is given away
        work = pair[1].irecv(0, into=into)
        if early:
            pair[0].isend(on(pair[0], i), 1)
        assert work.wait(SOON_S) is into
        assert values(pair[1], into) == [i]
        assert values(pair[1], seen) == [-i]


def test_freed_memory_is_not_used_again_before_its_readers_are_done(pair: list[Any]) -> None:
    gpu = pair[1].gpu
    for i in range(20):
        pair[0].isend(on(pair[0], i), 1)
    seen = []
    for _ in range(20):
        got = pair[1].recv(0, timeout=SOON_S)
        seen.append(gpu.empty(got))
        gpu.copy(seen[-1], got, gpu.current())
        del got  # while the stream has still to read it
    assert [values(pair[1], tensor) for tensor in seen] == [[i] for i in range(20)]


def test_each_thread_that_waits_has_its_own_stream_wait(pair: list[Any]) -> None:
    pair[0].isend(on(pair[0], 5), 1)
    work = pair[1].irecv(0)
    streams = [pair[1].gpu.compute, pair[1].gpu.sends]

    def look(stream: Any) -> list[float]:
        pair[1].gpu.use_stream(stream)
        return values(pair[1], work.wait(SOON_S))

    futures = [start(lambda s=stream: look(s)) for stream in streams]
    assert [future.result(SOON_S) for future in futures] == [[5], [5]]


def test_no_call_waits_for_the_gpu(pair: list[Any], name: str) -> None:
    """Neither isend, behind work that takes for ever, nor the wait of who has received."""
    pair[0].isend(on(pair[0], 1, 8), 1, 1)  # (the first ones connect)
    pair[1].recv(0, 1, timeout=SOON_S)
    release = pair[0].gpu.compute.hold()
    begin = time.monotonic()
    sends = [pair[0].isend(on(pair[0], i), 1) for i in range(5)]
    assert time.monotonic() - begin < 1
    if name in STREAMS:
        with pytest.raises(WaitTimeout):
            sends[0].wait(0.05)
    else:
        sends[0].wait(0.05)
    release()
    release = pair[1].gpu.receives.hold()
    got = [pair[1].recv(0, timeout=SOON_S) for _ in range(5)]  # complete, though nothing is there
    free = pair[1].gpu.upload(torch.zeros(3))
    read = start(lambda: values(pair[1], got[4]))
    assert not read.done()
    release()
    assert read.result(SOON_S) == [4]
    del free
    assert set(pair[0].gpu.copies) == {"compute", "sends"}  # never on the caller's stream ...
    assert pair[0].gpu.copies.count("compute") == 6  # ... but what this test did there


# -- the order of messages -------------------------------------------------------------------------


def test_messages_keep_their_order_whichever_memory_they_are_in(pair: list[Any]) -> None:
    release = pair[0].gpu.compute.hold()
    for i in range(12):
        size = [3, BIG][i % 4 // 2]
        value = on(pair[0], i, size) if i % 2 else torch.full((size,), float(i))
        pair[0].isend(value, 1)
    closing = start(lambda: pair[0].close(SOON_S))
    time.sleep(0.02)
    assert not closing.done()
    release()
    for i in range(12):
        got = pair[1].recv(0, timeout=SOON_S)
        assert pair[1].gpu.holds(got) == bool(i % 2)
        assert distinct(pair[1].gpu.download(got)) == [i]
    assert closing.result(SOON_S) is None


def test_neither_of_two_ranks_that_send_first_waits_for_ever(pair: list[Any]) -> None:
    def swap(rank: Any) -> list[float]:
        work = rank.isend(on(rank, rank.rank, 4_000_000), 1 - rank.rank)
        got = rank.recv(1 - rank.rank, timeout=SOON_S)
        work.wait(SOON_S)
        return values(rank, got)

    assert worlds.on_all_ranks(pair, swap) == [[1], [0]]


# -- where each part comes to lie ------------------------------------------------------------------


def mixed(rank: Any) -> tuple[torch.Tensor, ...]:
    flags = torch.tensor([1, 0, 1], dtype=torch.uint8)
    return (flags, on(rank, 3), torch.full((BIG,), 4.0), on(rank, 5, 1), torch.zeros(0, 2))


def test_a_message_of_both_kinds_keeps_them(pair: list[Any]) -> None:
    for early in (True, False):
        work = pair[1].irecv(0) if early else None
        pair[0].isend(mixed(pair[0]), 1)
        got = (work or pair[1].irecv(0)).wait(SOON_S)
        assert [pair[1].gpu.holds(part) for part in got] == [False, True, False, True, False]
        assert got[0].tolist() == [1, 0, 1] and distinct(got[2]) == [4]
        assert [values(pair[1], got[i]) for i in (1, 3)] == [[3], [5]]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("sent_on", ["cpu", "gpu"])
@pytest.mark.parametrize("into_on", ["cpu", "gpu", "both"])
def test_into_decides(pair: list[Any], early: bool, sent_on: str, into_on: str) -> None:
    parts = [torch.full((BIG,), 7.0), torch.full((5,), 8.0)]
    message = tuple(pair[0].gpu.upload(p) if sent_on == "gpu" else p for p in parts)
    into = [torch.zeros(BIG), torch.zeros(5)]
    for i in {"cpu": [], "gpu": [0, 1], "both": [1]}[into_on]:
        into[i] = on(pair[1], 0, len(into[i]))
    if not early:
        pair[0].isend(message, 1)
        pair[0].isend(torch.zeros(1), 1, 1)
        pair[1].recv(0, 1, timeout=SOON_S)
    work = pair[1].irecv(0, into=tuple(into))
    if early:
        pair[0].isend(message, 1)
    got = work.wait(SOON_S)
    assert [part is target for part, target in zip(got, into, strict=True)] == [True, True]
    for i, value in enumerate((7, 8)):
        assert distinct(pair[1].gpu.download(into[i])) == [value]


def test_a_rank_without_a_gpu_gets_it_on_the_cpu(name: str) -> None:
    gpu = FakeGpu(1)
    with worlds.world(name, 2, gpus=[gpu, None]) as (one, other):
        assert (one.device, other.device) == (torch.device("cpu"),) * 2  # (the fake's own)
        one.isend((torch.ones(2), on(one, 6)), 1)
        got = other.irecv(0).wait(SOON_S)
        assert [distinct(part) for part in got] == [[1], [6]]
        other.isend(got[1], 0)
        assert not gpu.holds(one.recv(1, timeout=SOON_S))  # it was on the CPU there
    gpu.close()


def test_expect_says_nothing_of_the_place(pair: list[Any]) -> None:
    for _ in range(2):
        pair[0].isend(on(pair[0], 2, 4), 1)
    wanted = TensorSpec(torch.float32, (4,))
    assert values(pair[1], pair[1].recv(0, expect=wanted, timeout=SOON_S)) == [2]
    with pytest.raises(MessageMismatch, match=r"float32\[4\].*float32\[3\]"):
        pair[1].recv(0, expect=TensorSpec(torch.float32, (3,)), timeout=SOON_S)
    into = on(pair[1], 1, 3)
    pair[0].isend(on(pair[0], 2, 4), 1)
    with pytest.raises(MessageMismatch):
        pair[1].recv(0, into=into, timeout=SOON_S)
    assert values(pair[1], into) == [1]


def test_sums_are_of_what_was_on_the_gpu() -> None:
    gpus = [FakeGpu(1, LATE_S), FakeGpu(2, LATE_S)]
    with worlds.world("unix", 2, gpus=gpus, checksum=True) as (one, other):
        one.isend(mixed(one), 1)
        assert values(other, other.irecv(0).wait(SOON_S)[1]) == [3]
        tensor = on(one, 1)
        release = gpus[0].compute.hold()
        one.isend(tensor, 1)
        stager = one._peers[1].stager
        move = stager.move

        def corrupt(tensor: torch.Tensor, ready: Any) -> None:
            move(tensor, ready)
            true, ready.copies[-1] = ready.copies[-1], ready.copies[-1] + 1
            one._peers[1]._checksum = False
            del true

        stager.move = corrupt
        release()
        assert values(other, other.recv(0, timeout=SOON_S)) == [2.0]


def test_cpu_messages_have_the_same_bytes_as_ever() -> None:
    gpu = FakeGpu(1)
    for message in (torch.zeros(2, 3), (torch.zeros(2), torch.ones(1, dtype=torch.bool))):
        for given in (None, gpu):
            spec, _ = prepare(message, given)
            assert spec.packed == MessageSpec.of(message).packed
    spec, _ = prepare((torch.zeros(2), gpu.upload(torch.zeros(3))), gpu)
    assert spec.packed.data == b"\x95\xc3\xa7float32\x91\x02\xabfloat32@gpu\x91\x03"
    again = MessageSpec.from_packed(*spec.packed)
    assert [part.on_gpu for part in again.tensors] == [False, True]
    assert again == spec == MessageSpec.of((torch.zeros(2), torch.zeros(3)))
    for wrong in ("@gpu", "float32@gpu@gpu", "gpu", "float32@tpu"):
        with pytest.raises(ProtocolError, match="dtype"):
            metadata.read_meta(*pack([False, wrong, [1]]))
    gpu.close()


# -- errors ----------------------------------------------------------------------------------------

LATE_ERROR = "CUDA error: an illegal memory access was encountered\nCompile with ..."
SAYS = r"rank {}'s GPU failed, noticed while {}: CUDA error: an illegal .* CUDA_LAUNCH_BLOCKING=1"


@streams_only
def test_an_error_of_the_device_names_the_rank_and_what_it_did(pair: list[Any]) -> None:
    pair[0].isend(on(pair[0], 1), 1)
    work = pair[1].irecv(0)
    work.wait(SOON_S)
    tensor = on(pair[0], 2)
    pair[0].gpu.broken = pair[1].gpu.broken = LATE_ERROR
    with pytest.raises(DeviceError, match=SAYS.format(1, "receiving from rank 0 with tag 0")):
        work.wait(SOON_S)
    with pytest.raises(DeviceError, match=SAYS.format(0, "sending to rank 1")):
        pair[0].isend(tensor, 1)
    with pytest.raises(DeviceError):  # it is over with this rank's transport
        pair[0].isend(torch.zeros(1), 1)
    with pytest.raises(PeerLost):
        pair[1].recv(0, 9, timeout=SOON_S)


@streams_only
def test_an_error_that_the_copying_thread_meets_ends_the_transport(pair: list[Any]) -> None:
    release = pair[0].gpu.compute.hold()
    work = pair[0].isend(on(pair[0], 1), 1)
    pair[0].gpu.broken = LATE_ERROR
    release()
    sending = SAYS.format(0, r"sending float32\[300000\] to rank 1")
    try:
        with pytest.raises(DeviceError, match=sending):
            work.wait(SOON_S)
    finally:
        pair[0].gpu.broken = ""
    with pytest.raises(DeviceError, match=sending):
        pair[0].irecv(1)


@streams_only
def test_no_memory_on_the_gpu_fails_the_receive_alone(pair: list[Any]) -> None:
    def full(_: TensorSpec) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    fresh, pair[1].gpu.fresh = pair[1].gpu.fresh, full
    pair[0].isend(on(pair[0], 1), 1)
    with pytest.raises(DeviceError, match=r"rank 1's GPU .* out of memory\. Tried .* 3 GiB$"):
        pair[1].recv(0, timeout=SOON_S)
    pair[1].gpu.fresh = fresh
    pair[0].isend(on(pair[0], 2), 1)
    assert values(pair[1], pair[1].recv(0, timeout=SOON_S)) == [2]


def test_what_is_over_the_limits_is_refused_before_it_is_copied() -> None:
    gpus = [FakeGpu(1), FakeGpu(2)]
    with worlds.world("unix", 2, gpus=gpus, limits=Limits(payload_nbytes=1000)) as (one, other):
        with pytest.raises(InvalidArgument, match="1004 bytes of payload"):
            one.isend(on(one, 1, 251), 1)
        one.isend(on(one, 3, 250), 1)
        assert values(other, other.recv(0, timeout=SOON_S)) == [3]


def test_a_tensor_of_another_gpu_is_refused_in_a_sentence() -> None:
    gpu = FakeGpu(1)
    with pytest.raises(
        InvalidArgument, match=r"tensors of cpu and of the CPU, this one is on meta"
    ):
        prepare(torch.zeros(1, device="meta"), gpu)
    gpu.close()


@streams_only
def test_a_peer_that_dies_fails_what_is_copied_for_it_and_leaves_no_thread(name: str) -> None:
    before = threading.active_count()
    gpus = [FakeGpu(1), FakeGpu(2)]
    with worlds.world(name, 2, gpus=gpus) as (one, other):
        one.isend(on(one, 1), 1)
        other.recv(0, timeout=SOON_S)
        release = gpus[0].compute.hold()
        works = [one.isend(on(one, i), 1) for i in range(3)]
        other.abort(TransportClosed("killed"))
        for work in works:
            with pytest.raises(PeerLost, match="rank 1"):
                work.wait(SOON_S)
        release()
    eventually(lambda: threading.active_count() == before)


def test_the_fake_shows_what_it_is_for() -> None:
    """Without events, numbers are wrong: else no test here would mean anything."""
    gpu = FakeGpu(3, 0.02)
    tensor = gpu.upload(torch.ones(1000))
    early, late = torch.empty(1000), gpu.empty(torch.empty(1000))
    release = gpu.sends.hold()
    gpu.copy(late, tensor, gpu.sends)
    gpu.copy(early, late, gpu.receives)  # behind nothing
    gpu.mark(gpu.receives).synchronize()
    assert not (early == 1).all()
    release()
    release = gpu.compute.hold()
    out = torch.empty(4000, dtype=torch.uint8)
    gpu.copy(out, gpu.upload(torch.ones(4000, dtype=torch.uint8)), gpu.receives)
    release()  # (the upload's memory was freed at once, and nobody had said who reads it)
    gpu.mark(gpu.compute).synchronize()
    assert bool((gpu.download(gpu.empty(out)) == POISON).all())
    gpu.close()
