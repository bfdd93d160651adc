"""Payloads from GPU to GPU: order over both sides' streams, who owns a block, and every way out.

What holds for GPU tensors over any transport is in test_staging.py, which runs over this one too;
and so does the contract. The GPU is the one of fake_gpu.py: its memory and events are shared by
processes, its copies come late.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transport_worlds as worlds
from fake_gpu import FakeGpu
from gpu_ranks import processes, told
from transport_worlds import SOON_S, distinct, eventually, on_all_ranks, start

from transport.cuda import ipc_sender as ipc_arena
from transport.cuda.ipc_sender import SLOTS, TABLE_NBYTES
from transport.cuda.transport import CudaIpcTransport
from transport.errors import DeviceError, PeerLeft, PeerLost, ProtocolError, UnknownTransport
from transport.message.tensors import prepare
from transport.registry import AUTO_ON_GPU, NEED_GPU, transport_class
from transport.shm.arena import ARENA_NBYTES
from transport.wire.format import FrameKind

LATE_S = 0.004
BIG = 150_000
MIB = 2**20


def on(rank: Any, value: float, size: int = BIG) -> torch.Tensor:
    return rank.gpu.upload(torch.full((size,), float(value)))


def values(rank: Any, tensor: torch.Tensor) -> list[float]:
    assert rank.gpu.holds(tensor)
    return distinct(rank.gpu.download(tensor))


def acquaint(ranks: list[Any]) -> None:
    """Exchange the first messages, which are staged, so that later ones are lent."""
    for src in ranks:
        for dst in ranks:
            if src is not dst:
                src.isend(on(src, 0, 1), dst.rank, 77)
                dst.recv(src.rank, 77, timeout=SOON_S)
    for rank in ranks:
        rank.gpu.copies.clear()


@pytest.fixture
def pair() -> Iterator[list[Any]]:
    with worlds.world("cuda_ipc", 2, gpus=[FakeGpu(1, LATE_S), FakeGpu(2, LATE_S)]) as ranks:
        acquaint(ranks)
        yield ranks


def lender(ranks: list[Any]) -> Any:
    return ranks[0]._peers[1].lender


def borrowed(ranks: list[Any]) -> Any:
    return ranks[1]._peers[0].borrowed


def lent(ranks: list[Any]) -> int:
    """How many blocks the receiver has not given back."""
    return len(borrowed(ranks)._lent_slots)


# -- one copy, in the memory of the receiver -------------------------------------------------------


def test_a_message_is_copied_once_and_used_where_it_lies(pair: list[Any]) -> None:
    pair[0].isend((on(pair[0], 5), torch.ones(3), on(pair[0], 6, 10)), 1)
    first, flags, second = pair[1].irecv(0).wait(SOON_S)
    assert pair[0].gpu.copies == ["compute", "compute", "sends", "sends"]
    assert pair[1].gpu.copies == []
    assert values(pair[1], first) == [5] and values(pair[1], second) == [6]
    assert flags.tolist() == [1, 1, 1] and not pair[1].gpu.holds(flags)
    assert first.data_ptr() - borrowed(pair)._memory.address == TABLE_NBYTES + 64
    first.zero_()  # it is the receiver's alone


def test_a_block_comes_back_with_its_last_tensor_and_is_used_again(pair: list[Any]) -> None:
    places = set()
    for i in range(5):
        pair[0].isend((on(pair[0], i), on(pair[0], i)), 1)
        first, second = pair[1].irecv(0).wait(SOON_S)
        places.add(first.data_ptr())
        del first
        assert lent(pair) == 1
        assert values(pair[1], second.view(3, -1)[1]) == [i]
        del second
        eventually(lambda: lent(pair) == 0)
    assert len(places) == 1


def test_a_block_is_not_written_before_it_is_read(pair: list[Any]) -> None:
    """The receiver frees it while its stream has still to read it, and the sender goes on."""
    gpu, seen = pair[1].gpu, []
    for i in range(30):
        pair[0].isend(on(pair[0], i), 1)
        got = pair[1].recv(0, timeout=SOON_S)
        assert borrowed(pair)._memory.address <= got.data_ptr()
        seen.append(gpu.empty(got))
        gpu.copy(seen[-1], got, gpu.current())
        del got
        gc.collect()
    assert [values(pair[1], tensor) for tensor in seen] == [[i] for i in range(30)]


def test_a_block_read_by_several_streams_waits_for_all_of_them(pair: list[Any]) -> None:
    gpu, seen = pair[1].gpu, []
    pair[0].isend(on(pair[0], 1), 1)
    work = pair[1].irecv(0)

    def read(work: Any, stream: Any) -> torch.Tensor:
        gpu.use_stream(stream)
        got = work.wait(SOON_S)
        copied = gpu.empty(got)
        gpu.copy(copied, got, stream)
        return copied

    seen.append(start(lambda w=work: read(w, gpu.compute)).result(SOON_S))
    release = gpu.receives.hold()
    seen.append(start(lambda w=work: read(w, gpu.receives)).result(SOON_S))
    del work
    gc.collect()
    assert lent(pair) == 0
    pair[0].isend(on(pair[0], 2), 1)
    time.sleep(10 * LATE_S)  # (as long as a copy that does not wait would take)
    release()
    assert values(pair[1], pair[1].recv(0, timeout=SOON_S)) == [2]
    for stream in (gpu.compute, gpu.receives):
        gpu.mark(stream).synchronize()
    assert [values(pair[1], tensor) for tensor in seen] == [[1], [1]]


def test_the_sender_may_write_its_tensor_again_on_its_stream(pair: list[Any]) -> None:
    tensor, got = on(pair[0], 0), []
    for i in range(20):
        pair[0].gpu.fill(tensor, i)
        pair[0].isend(tensor, 1).wait(SOON_S)
        pair[0].gpu.fill(tensor, 99)
        got.append(pair[1].recv(0, timeout=SOON_S))
    assert [values(pair[1], each) for each in got] == [[i] for i in range(20)]


def test_a_sent_tensor_that_nobody_holds_lives_until_it_is_copied(pair: list[Any]) -> None:
    for i in range(20):
        pair[0].isend(on(pair[0], i), 1)  # (the next one's memory would be the same)
    assert [values(pair[1], pair[1].recv(0, timeout=SOON_S)) for _ in range(20)] == [
        [i] for i in range(20)
    ]


def test_a_received_tensor_that_is_sent_on_keeps_its_block_until_it_is_copied(
    pair: list[Any],
) -> None:
    release = pair[1].gpu.sends.hold()
    pair[0].isend(on(pair[0], 1), 1)
    got = pair[1].recv(0, timeout=SOON_S)
    pair[1].isend(got, 0)
    del got
    gc.collect()
    pair[0].isend(on(pair[0], 2), 1)  # (to the same block, which was given back)
    time.sleep(10 * LATE_S)
    release()
    assert values(pair[1], pair[1].recv(0, timeout=SOON_S)) == [2]
    assert values(pair[0], pair[0].recv(1, timeout=SOON_S)) == [1]


def test_memory_to_be_filled_may_be_dropped_before_it_is(pair: list[Any]) -> None:
    gpu = pair[1].gpu
    pair[0].isend(on(pair[0], 7), 1)
    release = gpu.receives.hold()
    pair[1].irecv(0, into=on(pair[1], 0))
    eventually(lambda: "receives" in gpu.copies)
    gc.collect()
    later = gpu.upload(torch.full((BIG,), 3.0))  # the same memory, if nobody says who writes there
    gpu.mark(gpu.sends).synchronize()
    read = start(lambda: values(pair[1], later))
    time.sleep(10 * LATE_S)
    release()
    read.result(SOON_S)
    gpu.mark(gpu.receives).synchronize()
    assert values(pair[1], later) == [3]


@pytest.mark.parametrize("seed", range(3))
def test_no_two_messages_ever_share_memory(seed: int) -> None:
    """Kept and freed in any order; in place, copied or staged; in both directions."""
    gpus = [FakeGpu(seed, 0.0005), FakeGpu(seed + 9, 0.0005)]
    with worlds.world("cuda_ipc", 2, gpus=gpus) as ranks:

        def run(rank: Any) -> int:
            rng, kept = random.Random(f"{seed} {rank.rank}"), []
            for i in range(60):
                size = rng.choice([1, 100, 40_000, 40_000, 3 * MIB])
                message = on(rank, i, size) if rng.random() < 0.8 else torch.full((size,), float(i))
                work = rank.isend((torch.full((2,), i), message), 1 - rank.rank)
                flag, got = rank.irecv(1 - rank.rank).wait(SOON_S)
                assert flag.tolist() == [i, i]
                kept.append((i, got))
                while len(kept) > rng.randrange(60):
                    j, tensor = kept.pop(rng.randrange(len(kept)))
                    assert distinct(rank.gpu.download(tensor)) == [j]
                if rng.random() < 0.5:
                    work.wait(SOON_S)
                del flag, got, message, work
            for j, tensor in kept:
                assert distinct(rank.gpu.download(tensor)) == [j]
            return len(rank._peers[1 - rank.rank].lender._written)

        assert min(on_all_ranks(ranks, run)) > 1


# -- when there is no room -------------------------------------------------------------------------


def test_who_keeps_much_has_the_rest_copied_so_that_blocks_come_back(pair: list[Any]) -> None:
    kept = []
    for i in range(2 * SLOTS):
        pair[0].isend(on(pair[0], i, 100), 1)
        kept.append(pair[1].recv(0, timeout=SOON_S))
    eventually(lambda: lent(pair) <= SLOTS // 2)
    assert [values(pair[1], tensor) for tensor in kept] == [[i] for i in range(2 * SLOTS)]
    assert pair[1].gpu.copies.count("receives") >= SLOTS
    assert not started(pair[0])


def started(rank: Any) -> bool:
    """Whether anything was staged since the first message."""
    return rank._peers[1 - rank.rank].stager._lane._jobs.qsize() > 0


def test_what_finds_no_slot_or_block_is_staged_and_keeps_its_place(pair: list[Any]) -> None:
    sends = [pair[0].isend(on(pair[0], i, 1000), 1) for i in range(SLOTS + 30)]
    assert len(lender(pair)._lent) == SLOTS
    for i in range(SLOTS + 30):
        assert values(pair[1], pair[1].recv(0, timeout=SOON_S)) == [i]
    for send in sends:
        send.wait(SOON_S)
    large = torch.ones(ARENA_NBYTES // 4 + 1)  # longer than all there is
    pair[0].isend(pair[0].gpu.upload(large), 1)
    assert values(pair[1], pair[1].recv(0, timeout=SOON_S)) == [1]
    pair[0].isend(on(pair[0], 3), 1)
    assert values(pair[1], pair[1].recv(0, timeout=SOON_S)) == [3]


@pytest.mark.parametrize("who", ["sender cannot open it", "receiver has no memory"])
def test_a_pair_that_cannot_share_memory_stages_for_ever(who: str) -> None:
    gpus = [FakeGpu(1, LATE_S, sealed=who.startswith("sender")), FakeGpu(2, LATE_S)]
    if who.startswith("receiver"):

        def share(_: int) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        gpus[1].share = share  # type: ignore[method-assign]
    with worlds.world("cuda_ipc", 2, gpus=gpus) as ranks:
        for i in range(5):
            ranks[0].isend((torch.ones(1), on(ranks[0], i)), 1).wait(SOON_S)
            assert values(ranks[1], ranks[1].irecv(0).wait(SOON_S)[1]) == [i]
        assert lender(ranks)._memory is None
        if who.startswith("sender"):
            assert "invalid device context" in lender(ranks).refused


def test_over_tcp_and_to_who_has_no_gpu_it_is_staged() -> None:
    gpus = [FakeGpu(1), None]
    with worlds.world("cuda_ipc", 2, gpus=gpus) as ranks:
        for i in range(4):
            ranks[0].isend(on(ranks[0], i), 1)
            assert distinct(ranks[1].recv(0, timeout=SOON_S)) == [i]
            ranks[1].isend(torch.full((BIG,), float(i)), 0)  # lent, as over shm
            assert distinct(ranks[0].recv(1, timeout=SOON_S)) == [i]
        assert ranks[1]._peers[0].lender._blocks


def test_memory_is_given_back_on_both_sides_when_it_is_over() -> None:
    with worlds.world("cuda_ipc", 2, gpus=[FakeGpu(1), FakeGpu(2)]) as ranks:
        acquaint(ranks)
        ranks[0].isend(on(ranks[0], 4), 1)
        kept = ranks[1].recv(0, timeout=SOON_S)
        theirs, ours = lender(ranks)._memory, borrowed(ranks)._memory
        closing = [start(lambda r=rank: r.close(SOON_S)) for rank in ranks]
        for future in closing:
            future.result(SOON_S)
        assert theirs.closed and not ours.closed
        assert values(ranks[1], kept) == [4]  # though its sender is gone
        del kept
        eventually(lambda: gc.collect() >= 0 and ours.closed)
        assert not ipc_arena._retired


# -- how it ends -----------------------------------------------------------------------------------


def test_close_waits_for_the_copies_and_says_so_to_who_comes_later(pair: list[Any]) -> None:
    release = pair[0].gpu.compute.hold()
    pair[0].isend(on(pair[0], 8), 1)
    closing = start(lambda: pair[0].close(SOON_S))
    with pytest.raises(PeerLeft):
        pair[1].recv(0, 5, timeout=SOON_S)  # the goodbye is here, and the peer hangs up
    time.sleep(0.02)
    assert not closing.done()
    release()
    assert closing.result(SOON_S) is None
    work = pair[1].irecv(0)

    def gone(_: object) -> None:
        raise AssertionError("this event was made by a process that may be gone")

    for event in borrowed(pair)._written.values() if borrowed(pair) else ():
        event.wait = gone
    assert values(pair[1], work.wait(SOON_S)) == [8]


def test_an_error_of_the_device_is_named_wherever_it_shows(pair: list[Any]) -> None:
    late = r"CUDA error: .* CUDA_LAUNCH_BLOCKING=1"
    tensor = on(pair[0], 1)
    sent = pair[0].isend(tensor, 1)
    received = pair[1].irecv(0)
    received.wait(SOON_S)
    pair[0].isend(tensor, 1, 2)
    pair[0].gpu.broken = pair[1].gpu.broken = "CUDA error: misaligned address"
    with pytest.raises(DeviceError, match=rf"rank 0's .* sending to rank 1 with tag 0: {late}"):
        sent.wait(SOON_S)
    with pytest.raises(DeviceError, match=rf"rank 1's .* receiving from rank 0 .*: {late}"):
        received.wait(SOON_S)
    with pytest.raises(DeviceError, match=rf"rank 0's .* float32\[{BIG}\] to rank 1: {late}"):
        pair[0].isend(tensor, 1)
    with pytest.raises((DeviceError, PeerLost), match="rank"):
        pair[1].recv(0, 3, timeout=SOON_S)


@pytest.mark.parametrize("word", [0, 64, TABLE_NBYTES - 64, 2**40, TABLE_NBYTES + 64, 2**63])
def test_a_place_that_cannot_be_ends_the_connection(pair: list[Any], word: int) -> None:
    spec, _ = prepare(on(pair[0], 1), pair[0].gpu)
    connection = pair[0]._peers[1]
    if word == TABLE_NBYTES + 64:  # it was lent already
        pair[0].isend(on(pair[0], 1), 1, 3)
        pair[0].isend(torch.zeros(1), 1, 4)
        pair[1].recv(0, 4, timeout=SOON_S)
        word = TABLE_NBYTES | (SLOTS - 1)
    with pair[0]._lock:
        connection.queue(FrameKind.LENT, spec.packed, spec.nbytes, tag=1, word=word)
    with pytest.raises((ProtocolError, DeviceError), match="no block at offset|cannot|could"):
        pair[1].recv(0, 1, timeout=SOON_S)


def test_who_has_shown_nothing_is_written_nothing() -> None:
    with worlds.world("cuda_ipc", 2, gpus=[FakeGpu(1), None]) as ranks:
        ranks[0].send(torch.ones(1), 1, timeout=SOON_S)
        ranks[1].recv(0, timeout=SOON_S)
        spec, _ = prepare(on(ranks[0], 1), ranks[0].gpu)
        with ranks[0]._lock:
            ranks[0]._peers[1].queue(FrameKind.LENT, spec.packed, spec.nbytes, word=TABLE_NBYTES)
        with pytest.raises(ProtocolError, match="a GPU that was not shown"):
            ranks[1].recv(0, timeout=SOON_S)


def test_a_forked_child_gives_nothing_back(pair: list[Any]) -> None:
    pair[0].isend(on(pair[0], 2), 1)
    got = pair[1].recv(0, timeout=SOON_S)
    child = os.fork()
    if child == 0:
        del got
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lent(pair) == 1
    assert values(pair[1], got) == [2]


# -- processes -------------------------------------------------------------------------------------


def talk(transport: Any, pipe: Any) -> list[int]:
    """Exchange messages with all others, keep some, and say over how many blocks."""
    me, size = transport.rank, transport.world_size
    rng, kept = random.Random(me), []
    others = [rank for rank in range(size) if rank != me]
    for i in range(40):
        length = (1, 1000, 200_000)[i % 3]
        works = [transport.isend((torch.tensor([i]), on(transport, i, length)), o) for o in others]
        for other in others:
            flag, got = transport.irecv(other).wait(30)
            assert int(flag) == i
            kept.append((i, got))
            del flag, got
        if i == 30:
            lenders = [peer.lender for peer in transport._peers.values()]
        for work in works:
            work.wait(30)
        while len(kept) > rng.randrange(20):
            j, tensor = kept.pop(rng.randrange(len(kept)))
            assert values(transport, tensor) == [j]
            del tensor
    for j, tensor in kept:
        assert values(transport, tensor) == [j]
    transport.close(30)
    return [len(each._written) for each in lenders]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_in_processes_of_their_own(world_size: int) -> None:
    with processes(CudaIpcTransport, world_size, talk) as (_, pipes):
        for pipe in pipes:
            what, slots = told(pipe)
            assert what == "returned", slots
            assert len(slots) == world_size - 1 and min(slots) > 0


def die_in_mid_copy(transport: Any, pipe: Any) -> str:
    """Rank 1 sends, and is killed when the frame of a message is there and its copy is not."""
    other, gpu, kept = 1 - transport.rank, transport.gpu, []
    for i in range(8):
        transport.isend(on(transport, i), other)
        kept.append(transport.recv(other, timeout=30))
        assert values(transport, kept[i]) == [i]
    if transport.rank == 1:
        gpu.mark(gpu.sends).synchronize()
        gpu.compute.hold()
        transport.isend(on(transport, 99), other)
        pipe.send("copying")
        pipe.recv()  # (nothing comes)
    torn = transport.recv(other, timeout=30)
    pipe.send("has the frame")
    try:
        transport.recv(other, timeout=30)
    except PeerLost as error:
        gpu.use_stream(gpu.sends)  # (the other one waits for what never comes)
        assert [values(transport, tensor) for tensor in kept] == [[i] for i in range(8)]
        del torn
        return str(error)
    return "never"


def test_a_peer_that_is_killed_is_lost_and_what_it_had_sent_stays() -> None:
    with processes(CudaIpcTransport, 2, die_in_mid_copy) as (ranks, pipes):
        assert told(pipes[0]) == "has the frame"
        assert told(pipes[1]) == "copying"
        os.kill(ranks[1].pid, signal.SIGKILL)
        what, text = told(pipes[0])
        assert what == "returned", text
        assert "rank 1" in text


def unreachable(_: bytes) -> Any:
    raise RuntimeError("CUDA error: invalid resource handle")


def test_a_sender_whose_event_cannot_be_opened_is_lost_and_not_this_ranks_gpu() -> None:
    gpus = [FakeGpu(1), FakeGpu(2)]
    with worlds.world("cuda_ipc", 3, gpus=[*gpus, None]) as ranks:
        acquaint(ranks[:2])
        gpus[1].open_event = unreachable  # type: ignore[method-assign]
        ranks[0].isend(on(ranks[0], 1), 1)
        with pytest.raises(PeerLost, match=r"rank 0 is lost: .* invalid resource handle"):
            ranks[1].recv(0, timeout=SOON_S)
        ranks[2].isend(torch.ones(1), 1)  # the others go on
        ranks[1].recv(2, timeout=SOON_S)


def test_a_receiver_whose_event_cannot_be_opened_is_sent_to_by_staging() -> None:
    gpus = [FakeGpu(1), FakeGpu(2)]
    with worlds.world("cuda_ipc", 2, gpus=gpus) as ranks:
        acquaint(ranks)
        gpus[0].open_event = unreachable  # type: ignore[method-assign]
        for i in range(5):
            ranks[0].isend(on(ranks[0], i), 1)
            assert values(ranks[1], ranks[1].recv(0, timeout=SOON_S)) == [i]
        assert "invalid resource" in lender(ranks).refused


# -- the choice ------------------------------------------------------------------------------------


def test_viable_says_in_a_sentence_why_not() -> None:
    reason = CudaIpcTransport.viable()
    if reason is None:
        pytest.skip("this machine has what it needs")
    assert reason in (
        "torch was built without CUDA",
        "this machine has no CUDA device that torch can use",
    )
    with pytest.raises(UnknownTransport, match=f"'cuda_ipc' cannot be used here: .*{reason}"):
        transport_class("cuda_ipc")
    assert transport_class("auto", gpu=True) is transport_class("auto")
    assert AUTO_ON_GPU[0] == "cuda_ipc" and "cuda_ipc" in NEED_GPU
