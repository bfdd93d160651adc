"""Lent memory: used in place, given back once, never read while it is written, never leaked."""

from __future__ import annotations

import os
import random
import resource
import socket

import pytest
import torch
import transport_worlds as worlds
from transport_worlds import SOON_S

from transport.errors import ProtocolError
from transport.message.specs import MessageSpec
from transport.shm.arena import ALIGNMENT, BorrowedMemory, LendingArena, layout
from transport.shm.transport import LEND_NBYTES, LendingConnection
from transport.wire.format import FrameKind

KIB = 1024
BIG = 16 * LEND_NBYTES


def arena(nbytes: int = 1024 * KIB) -> tuple[LendingArena, BorrowedMemory]:
    lender = LendingArena(nbytes)
    return lender, BorrowedMemory(os.dup(lender.fd), nbytes)


@pytest.fixture
def lent():
    made = []

    def make(nbytes: int = 1024 * KIB) -> tuple[LendingArena, BorrowedMemory]:
        made.append(arena(nbytes))
        return made[-1]

    yield make
    for lender, _ in made:
        lender.close()


def through(
    lender: LendingArena, borrowed: BorrowedMemory, *tensors: torch.Tensor
) -> list[torch.Tensor]:
    spec = MessageSpec.of(tensors)
    offset = lender.lend(spec, tensors)
    assert offset is not None
    return borrowed.take(offset, spec)


def test_every_tensor_arrives_whole_aligned_and_over_the_lent_memory(lent) -> None:
    lender, borrowed = lent()
    sent = [torch.rand(3, 5), torch.ones(0, 2), torch.arange(7).bool(), torch.tensor(3.5)]
    got = through(lender, borrowed, *sent)
    for theirs, mine in zip(sent, got, strict=True):
        assert torch.equal(theirs, mine)
        assert theirs.dtype is mine.dtype
        assert mine.data_ptr() % ALIGNMENT == 0
    got[0].zero_()  # the receiver's alone: it may be written to
    assert float(sent[0].sum()) > 0


def test_a_block_comes_back_when_its_last_storage_is_freed_and_not_before(lent) -> None:
    lender, borrowed = lent(64 * KIB)
    first, second = through(lender, borrowed, torch.zeros(4000), torch.ones(4000))
    spec = MessageSpec.of(torch.zeros(9000))
    view = second.view(2, 2000)[1].detach()
    del first, second
    assert lender.lend(spec, [torch.zeros(9000)]) is None  # it would not fit beside
    assert float(view.sum()) == 2000
    del view
    assert lender.lend(spec, [torch.zeros(9000)]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_two_messages_ever_share_memory(seed: int, lent) -> None:
    rng = random.Random(seed)
    lender, borrowed = lent(256 * KIB)
    held: list[tuple[int, torch.Tensor]] = []
    refused = 0
    for number in range(600):
        size = rng.choice([1, 100, 5000, 5000, 20_000, 60_000])
        payload = torch.full((size,), number % 251, dtype=torch.uint8)
        offset = lender.lend(MessageSpec.of(payload), [payload])
        if offset is None:
            refused += 1
        else:
            held += [(number, t) for t in borrowed.take(offset, MessageSpec.of(payload))]
        while len(held) > rng.randrange(12):
            held.pop(rng.randrange(len(held)))
        for sent, tensor in held:
            assert bool((tensor == sent % 251).all())
    assert refused < 600
    held.clear()
    del tensor
    everything = torch.zeros(200 * KIB, dtype=torch.uint8)  # cut anew once nothing is lent
    assert lender.lend(MessageSpec.of(everything), [everything]) == 0


def test_a_kept_tensor_does_not_keep_what_lies_around_it_from_large_blocks(lent) -> None:
    lender, borrowed = lent(256 * KIB)
    small = torch.full((10_000,), 3, dtype=torch.uint8)
    held = [*through(lender, borrowed, small)]
    kept = through(lender, borrowed, small + 1)[0]
    held += [t for _ in range(15) for t in through(lender, borrowed, small)]
    held.clear()
    assert int(kept[0]) == 4
    large = torch.full((200 * KIB,), 5, dtype=torch.uint8)
    (got,) = through(lender, borrowed, large)
    front = through(lender, borrowed, small)[0]
    assert front.data_ptr() < kept.data_ptr() < got.data_ptr()
    for tensor, value in ((front, small), (kept, small + 1), (got, large)):
        assert torch.equal(tensor, value)


def test_nothing_is_lent_to_who_has_not_mapped_the_arena() -> None:
    lender = LendingArena(64 * KIB)
    assert not lender.wanted(stream_busy=True)
    BorrowedMemory(os.dup(lender.fd), 64 * KIB)
    assert lender.wanted(stream_busy=False)
    lender.close()


def test_to_who_wants_the_stream_is_lent_only_while_it_is_behind(lent) -> None:
    lender, borrowed = lent(64 * KIB)
    borrowed.wish(lent=False)
    assert not lender.wanted(stream_busy=False)
    assert lender.wanted(stream_busy=True)
    kept = through(lender, borrowed, torch.zeros(100))
    assert lender.wanted(stream_busy=False)
    del kept
    assert not lender.wanted(stream_busy=False)
    borrowed.wish(lent=True)
    assert lender.wanted(stream_busy=False)


def test_more_than_the_arena_is_never_lent(lent) -> None:
    lender, _ = lent(64 * KIB)
    tensor = torch.zeros(64 * KIB, dtype=torch.uint8)
    assert lender.lend(MessageSpec.of(tensor), [tensor]) is None


@pytest.mark.parametrize("offset", [1, 32, 1024 * KIB, 1024 * KIB - 64, 2**63, 2**64 - 64])
def test_an_offset_that_is_no_blocks_is_refused(offset: int, lent) -> None:
    _, borrowed = lent()
    with pytest.raises(ProtocolError, match="no block at offset"):
        borrowed.take(offset, MessageSpec.of(torch.zeros(4)))


def test_a_block_that_is_in_use_is_not_handed_out_twice(lent) -> None:
    lender, borrowed = lent()
    spec = MessageSpec.of(torch.zeros(4))
    offset = lender.lend(spec, [torch.zeros(4)])
    assert offset is not None
    kept = borrowed.take(offset, spec)
    with pytest.raises(ProtocolError, match="no block"):
        borrowed.take(offset, spec)
    del kept


def test_memory_that_could_shrink_under_its_reader_is_refused() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(ProtocolError, match="not sealed"):
        BorrowedMemory(fd)
    with pytest.raises(OSError):
        os.fstat(fd)  # it was closed
    with open(os.devnull) as file, pytest.raises(ProtocolError, match="cannot be mapped"):
        BorrowedMemory(os.dup(file.fileno()))
    for nbytes in (8192, 1):
        lender = LendingArena(nbytes)
        with pytest.raises(ProtocolError, match=f"{nbytes} bytes of lent memory, at most 4096"):
            BorrowedMemory(os.dup(lender.fd), 4096)
        lender.close()


def test_a_forked_child_gives_nothing_back(lent) -> None:
    lender, borrowed = lent(64 * KIB)
    (kept,) = through(lender, borrowed, torch.ones(12_000))
    child = os.fork()
    if child == 0:
        del kept
        os._exit(0)
    os.waitpid(child, 0)
    spec = MessageSpec.of(torch.zeros(12_000))
    assert lender.lend(spec, [torch.zeros(12_000)]) is None
    assert float(kept.sum()) == 12_000
    del kept
    assert lender.lend(spec, [torch.zeros(12_000)]) == 0


def test_layout_is_aligned_and_disjoint() -> None:
    spec = MessageSpec.of((torch.zeros(1), torch.zeros(0), torch.zeros(17), torch.zeros(16)))
    assert layout(spec) == ((0, 64, 64, 192), 256)


# -- over the transport ----------------------------------------------------------------------------


def connected(ranks: list[worlds.ShmTransport]) -> None:
    ranks[0].send(torch.zeros(1), 1, 99)
    ranks[1].recv(0, 99, timeout=SOON_S)
    ranks[1].send(torch.zeros(1), 0, 99)
    ranks[0].recv(1, 99, timeout=SOON_S)


def in_use(rank: worlds.ShmTransport, peer: int) -> int:
    return len(rank._peers[peer].borrowed._used)


def test_a_large_message_is_lent_and_a_small_one_is_not() -> None:
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        for size, lent in ((LEND_NBYTES - 1, 0), (LEND_NBYTES, 1)):
            ranks[0].isend(torch.ones(size, dtype=torch.uint8), 1)
            tensor = ranks[1].recv(0, timeout=SOON_S)
            assert int(tensor.sum()) == size
            assert in_use(ranks[1], 0) == lent
            del tensor
        assert in_use(ranks[1], 0) == 0
        into = torch.zeros(BIG)
        ranks[0].isend(torch.ones(BIG), 1)
        assert ranks[1].recv(0, into=into, timeout=SOON_S) is into
        assert float(into.sum()) == BIG
        assert in_use(ranks[1], 0) == 0  # copied out, so given back


def test_what_goes_into_the_receivers_tensor_comes_over_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the first; and what is used where it lies is lent again, after one more."""
    take, taken = BorrowedMemory.take, []
    monkeypatch.setattr(BorrowedMemory, "take", lambda *args: taken.append(1) or take(*args))
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        into = torch.zeros(BIG)
        lent = []
        for number, target in enumerate([into] * 3 + [None] * 3):
            taken.clear()
            receive = ranks[1].irecv(0, into=target)
            ranks[0].isend(torch.full((BIG,), float(number)), 1)
            assert bool((receive.wait(SOON_S) == number).all())
            lent.append(len(taken))
        assert lent == [1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("when", ["on the way", "at the map"])
def test_a_receiver_without_descriptors_gets_everything_over_the_stream(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel cannot hand over the arena's; or Python cannot have the one that its map keeps."""
    name = "_take_greeting" if when == "on the way" else "_map"
    whole = getattr(LendingConnection, name)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def without_descriptors(self: LendingConnection, *args: int) -> object:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            return whole(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(LendingConnection, name, without_descriptors)
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        for a, b in ((0, 1), (1, 0)):
            ranks[a].isend(torch.arange(BIG), b)
            assert torch.equal(ranks[b].recv(a, timeout=SOON_S), torch.arange(BIG))
            assert ranks[b]._peers[a].borrowed is None


def test_when_nothing_is_free_the_stream_takes_it_and_order_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transport.shm.transport.LendingArena", lambda: LendingArena(3 * BIG))
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        for number in range(10):
            ranks[0].isend(torch.full((BIG,), number, dtype=torch.uint8), 1)
        got = [ranks[1].recv(0, timeout=SOON_S) for _ in range(10)]
        assert [int(tensor[-1]) for tensor in got] == list(range(10))
        assert 0 < in_use(ranks[1], 0) < 10


def test_without_memory_for_an_arena_everything_goes_over_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory() -> LendingArena:
        raise OSError("no memory")

    monkeypatch.setattr("transport.shm.transport.LendingArena", no_memory)
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        ranks[0].isend(torch.ones(BIG), 1)
        assert float(ranks[1].recv(0, timeout=SOON_S).sum()) == BIG
        assert ranks[1]._peers[0].borrowed is None


def test_a_received_tensor_outlives_both_transports() -> None:
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        ranks[0].isend(torch.arange(BIG), 1)
        tensor = ranks[1].recv(0, timeout=SOON_S)
    del ranks
    assert torch.equal(tensor, torch.arange(BIG))
    tensor += 1


def test_a_lent_message_that_was_never_lent_ends_the_connection() -> None:
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        spec = MessageSpec.of(torch.zeros(BIG))
        with ranks[0]._lock:
            ranks[0]._peers[1].queue(FrameKind.LENT, spec.packed, spec.nbytes, tag=3, word=2**40)
        with pytest.raises(ProtocolError, match="from rank 0: no block at offset 1099511627776"):
            ranks[1].irecv(0, 3).wait(SOON_S)


def test_a_transport_that_lends_nothing_refuses_a_lent_message() -> None:
    with worlds.world("unix", 2) as ranks:
        connected(ranks)
        spec = MessageSpec.of(torch.zeros(BIG))
        with ranks[0]._lock:
            ranks[0]._peers[1].queue(FrameKind.LENT, spec.packed, spec.nbytes)
        with pytest.raises(ProtocolError, match="lends memory"):
            ranks[1].irecv(0).wait(SOON_S)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_lent_tensor_does_not_show_the_mode_of_who_moved_the_bytes(mode) -> None:
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        ranks[0].isend((torch.ones(BIG), torch.ones(2, 3)), 1)
        with mode():
            tensors = ranks[1].irecv(0).wait(SOON_S)
        assert in_use(ranks[1], 0) == 1
        for tensor in tensors:
            assert not tensor.is_inference()
            leaf = tensor.detach().requires_grad_()
            (2 * leaf).sum().backward()
            tensor.mul_(torch.ones(1, requires_grad=True))  # not a view made under no_grad


def test_a_message_with_long_metadata_is_not_lent_and_loses_no_block() -> None:
    with worlds.world("shm", 2) as ranks:
        connected(ranks)
        message = tuple(torch.ones(BIG // 100) for _ in range(100))
        ranks[0].isend(message, 1)
        assert len(ranks[1].irecv(0).wait(SOON_S)) == 100
        assert in_use(ranks[1], 0) == 0


@pytest.mark.parametrize("greeting", [b"x", b"\1", b"\0"])
def test_a_greeting_that_is_none(greeting: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that says it shows memory and does not, or shows some and says it does not."""

    def show(self, sock: socket.socket) -> None:
        lender = LendingArena(4096)
        socket.send_fds(sock, [greeting], [] if greeting == b"\1" else [lender.fd])
        lender.close()

    with worlds.world("shm", 2) as ranks:
        monkeypatch.setattr("transport.shm.transport.LendingConnection._show_arena", show)
        waiting = ranks[1].irecv(0)
        with pytest.raises(ProtocolError, match="is no greeting"):
            waiting.wait(SOON_S)
