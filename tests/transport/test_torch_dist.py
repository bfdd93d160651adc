"""Payloads over torch.distributed: order by call alone, no store, no default group, and every end.

The contract, exactness and failure suites run over gloo as well; here is what is its own.
"""

from __future__ import annotations

import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import transport_worlds as worlds
from jobs import nothing_left, run_job
from transport_worlds import SOON_S, eventually, start

import barepp
from barepp.testing import run_with_fault
from transport.cuda.device import local_gpu
from transport.errors import (
    InvalidArgument,
    PeerLeft,
    PeerLost,
    ProtocolError,
    TransportClosed,
    UnknownTransport,
)
from transport.message.specs import MessageSpec
from transport.message.tensors import fillable, prepare
from transport.registry import transport_class
from transport.sockets.addresses import Address
from transport.sockets.handshake import Hello, Role, Verdict
from transport.torch_dist import off_stream as apart
from transport.torch_dist.transport import TAG, GlooGroup, NcclTransport, PairStore
from transport.wire.format import Frame, FrameKind, Packed, encode


@pytest.fixture
def ranks() -> Iterator[list[Any]]:
    with worlds.world("gloo", 3) as transports:
        yield transports


def connected(sender: Any, receiver: Any) -> None:
    sender.send(torch.ones(3), receiver.rank, 99, timeout=SOON_S)
    receiver.recv(sender.rank, 99, timeout=SOON_S)


def lane_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("barepp-lane")}


# -- how payloads travel ---------------------------------------------------------------------------


class Spy:
    """A process group that says what it is asked for."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.calls: list[tuple[str, int, int]] = []

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        self.calls.append(("send", tensors[0].nbytes, tag))
        return self.group.send(tensors, peer, tag)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        self.calls.append(("recv", tensors[0].nbytes, tag))
        return self.group.recv(tensors, peer, tag)


def test_a_group_sees_one_direction_one_tag_and_the_order_of_the_frames(ranks: list[Any]) -> None:
    connected(ranks[0], ranks[1])
    out = ranks[0]._peers[1].outgoing._group
    into = ranks[1]._peers[0].incoming._group
    out._group, into._group = spies = Spy(out._group), Spy(into._group)
    works = [ranks[0].isend(torch.ones(tag + 1), 1, tag) for tag in range(9)]
    works.append(ranks[0].isend((torch.ones(20), torch.ones(0), torch.ones(30)), 1, 9))
    for tag in reversed(range(9)):  # asked for in another order, and over the same pair backwards
        assert ranks[1].recv(0, tag, timeout=SOON_S).numel() == tag + 1
        ranks[1].isend(torch.ones(50), 0, tag)
    assert [len(tensor) for tensor in ranks[1].irecv(0, 9).wait(SOON_S)] == [20, 0, 30]
    for work in works:
        work.wait(SOON_S)
    sizes = [4 * count for count in (*range(1, 10), 20, 30)]
    assert spies[0].calls == [("send", size, TAG) for size in sizes]
    assert spies[1].calls == [("recv", size, TAG) for size in sizes]


def test_only_ranks_that_speak_to_each_other_have_a_group(ranks: list[Any]) -> None:
    eventually(lambda: not lane_threads())  # an earlier test's
    connected(ranks[0], ranks[1])
    assert lane_threads() == {"barepp-lane-0-1", "barepp-lane-1-0"}


def test_there_is_no_default_group_and_gloo_listens_on_loopback_alone(ranks: list[Any]) -> None:
    connected(ranks[0], ranks[1])
    connected(ranks[1], ranks[2])
    assert not dist.is_initialized()
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) >= 2 * len(ranks)  # ours and gloo's
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_what_has_no_bytes_stays_on_the_stream(ranks: list[Any]) -> None:
    connected(ranks[0], ranks[1])
    out = ranks[0]._peers[1].outgoing._group
    out._group = spy = Spy(out._group)
    ranks[0].isend(torch.zeros(0, 4), 1)
    assert ranks[1].recv(0, timeout=SOON_S).shape == (0, 4)
    assert spy.calls == []


def test_a_payload_that_changes_on_its_way_is_an_error_when_sums_are_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with worlds.world("gloo", 2, checksum=True) as (one, other):
        connected(other, one)
        move = GlooGroup.move

        def corrupt(self: GlooGroup, tensor: torch.Tensor, ready: object) -> None:
            move(self, tensor ^ 0x40 if self._sends else tensor, ready)

        monkeypatch.setattr(GlooGroup, "move", corrupt)
        other.isend(torch.ones(1000, dtype=torch.uint8), 0, 7)
        with pytest.raises(ProtocolError, match=r"from rank 1: the payload's sum .* tag 7"):
            one.irecv(1, 7).wait(SOON_S)


def test_a_transport_without_lanes_refuses_an_apart_message() -> None:
    with worlds.world("unix", 2) as pair:
        connected(pair[0], pair[1])
        spec = MessageSpec.of(torch.zeros(4))
        with pair[0]._lock:
            pair[0]._peers[1].queue(FrameKind.APART, spec.packed, spec.nbytes)
        with pytest.raises(ProtocolError, match="sends a payload apart, but no path is open"):
            pair[1].irecv(0).wait(SOON_S)


# -- how it ends -----------------------------------------------------------------------------------


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let receives stay where they are, as gloo's do when a peer dies in the midst of a transfer.

    The event is set when one has begun.
    """
    move, begun, go_on = GlooGroup.move, threading.Event(), threading.Event()

    def stay(self: GlooGroup, tensor: torch.Tensor, ready: object) -> None:
        if not self._sends:
            begun.set()
            go_on.wait(SOON_S)
        move(self, tensor, ready)

    monkeypatch.setattr(GlooGroup, "move", stay)
    yield begun
    go_on.set()
    eventually(lambda: not lane_threads())


@pytest.mark.parametrize("behind", [False, True], ids=["alone", "with a frame behind it"])
def test_a_peer_that_ends_is_lost_though_gloo_never_says_so(
    behind: bool, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "LOOK_S", 0.05)
    with worlds.world("gloo", 2) as (one, other):
        work = one.irecv(1)
        other.isend(torch.ones(9), 0)
        assert stuck.wait(SOON_S)
        if behind:
            other.isend(torch.ones(9), 0)
            eventually(lambda: one._peers[1].pending is not None)
        other.abort(TransportClosed("crashed"))
        with pytest.raises(PeerLost, match="rank 1 ended"):
            work.wait(SOON_S)
        with pytest.raises(PeerLost):
            one.isend(torch.ones(9), 1)


@pytest.fixture
def notice(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let sends that are done go unnoticed until this is set."""
    move, event = GlooGroup.move, threading.Event()

    def dawdle(self: GlooGroup, tensor: torch.Tensor, ready: object) -> None:
        move(self, tensor, ready)
        if self._sends:
            event.wait(SOON_S)

    monkeypatch.setattr(GlooGroup, "move", dawdle)
    yield event
    event.set()


def test_a_send_that_was_taken_is_complete_though_the_peer_has_left_since(
    ranks: list[Any], notice: threading.Event
) -> None:
    """The receiver may have its message, and be gone, before the sender's lane has noticed."""
    taken = ranks[0].isend(torch.ones(9), 1, 1)
    assert ranks[1].recv(0, 1, timeout=SOON_S).sum() == 9
    ranks[1].close(SOON_S)
    eventually(lambda: ranks[0]._peers[1].state is apart.State.PARTING)
    eventually(lambda: ranks[0]._peers[1].socket is None)
    notice.set()
    taken.wait(SOON_S)
    with pytest.raises(PeerLeft, match="rank 1 has left"):
        ranks[0].isend(torch.ones(9), 1)


def test_who_closes_has_sent_what_was_taken_though_the_peer_hangs_up_first(
    ranks: list[Any], notice: threading.Event
) -> None:
    taken, mine = ranks[0].isend(torch.ones(9), 1, 1), ranks[0].irecv(1)
    assert ranks[1].recv(0, 1, timeout=SOON_S).sum() == 9
    closing = start(lambda: ranks[0].close(SOON_S))
    eventually(lambda: ranks[0]._peers[1].state is apart.State.PARTING)
    assert not closing.done()
    notice.set()
    closing.result(SOON_S)
    taken.wait(SOON_S)
    with pytest.raises(TransportClosed):
        mine.wait(SOON_S)


def test_a_goodbye_that_is_read_after_the_lane_broke_is_a_goodbye(
    ranks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane has said all that it will say, so nothing is awaited but the stream's word."""
    begin, broke = apart.OffStreamConnection._begin, apart.OffStreamConnection._on_send_broke
    left, all_said = threading.Event(), threading.Event()

    def move(*_: object) -> None:
        assert left.wait(SOON_S)
        raise RuntimeError("there is nobody")

    def begin_late(carrier: apart.OffStreamConnection, frame: Frame) -> bool:
        if frame.kind is FrameKind.GOODBYE and not all_said.is_set():
            carrier._hold(frame)
            return False
        return begin(carrier, frame)

    connected(ranks[1], ranks[0])
    carrier = ranks[1]._peers[0]

    def break_first(error: Exception) -> None:
        broke(carrier, error)
        all_said.set()
        carrier.resume()

    monkeypatch.setattr(carrier.outgoing._group, "move", move)
    monkeypatch.setattr(carrier.outgoing, "_on_break", break_first)
    monkeypatch.setattr(apart.OffStreamConnection, "_begin", begin_late)
    sending = ranks[1].isend(torch.zeros(3), 0)
    ranks[0].close(SOON_S)
    left.set()
    for broken in (ranks[1].irecv(0), sending):
        with pytest.raises(PeerLeft):
            broken.wait(SOON_S)


def test_an_abort_waits_for_no_lane(stuck: threading.Event) -> None:
    with worlds.world("gloo", 2) as (one, other):
        waiting = start(lambda: one.recv(1, timeout=SOON_S))
        other.isend(torch.ones(9), 0)
        assert stuck.wait(SOON_S)
        one.abort(TransportClosed("over"))
        assert isinstance(waiting.exception(SOON_S), TransportClosed)
        assert "barepp-lane-1-0" in lane_threads()


def test_a_group_that_breaks_by_itself_is_the_loss_of_the_peer(
    ranks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "STREAM_GRACE_S", 0.05)
    connected(ranks[1], ranks[0])

    def broken(self: GlooGroup, tensor: torch.Tensor, ready: object) -> None:
        raise RuntimeError("[/gloo/pair.cc:553] Cable pulled. Ask somebody. Good luck.")

    monkeypatch.setattr(GlooGroup, "move", broken)
    work = ranks[0].irecv(1)
    sending = ranks[1].isend(torch.ones(9), 0)
    with pytest.raises(PeerLost, match="^the payload path from rank 1 broke: Cable pulled$") as it:
        work.wait(SOON_S)
    assert isinstance(it.value.__cause__, RuntimeError)
    with pytest.raises(PeerLost, match="rank 0"):
        sending.wait(SOON_S)


def test_a_group_that_cannot_be_made_is_the_loss_of_the_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: GlooGroup, *_: object, sends: bool) -> None:
        raise RuntimeError("gloo has no address")

    with worlds.world("gloo", 2) as (one, other):
        monkeypatch.setattr(GlooGroup, "__init__", broken)
        with pytest.raises(PeerLost, match="no payload path to rank 1 could be opened: gloo"):
            one.recv(1, timeout=SOON_S)
        with pytest.raises(PeerLost, match="no payload path to rank 0 could be opened: gloo"):
            other.send(torch.ones(1), 0, timeout=SOON_S)


def test_an_end_while_groups_are_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    making, go_on, make = threading.Event(), threading.Event(), GlooGroup.__init__

    def slow(self: GlooGroup, *arguments: Any, sends: bool) -> None:
        making.set()
        go_on.wait(SOON_S)
        make(self, *arguments, sends=sends)

    monkeypatch.setattr(GlooGroup, "__init__", slow)
    with nothing_left(), worlds.world("gloo", 2) as (one, other):
        work = one.irecv(1)
        assert making.wait(SOON_S)
        eventually(lambda: one._peers[1].connected)
        assert one._contacts._judge(Hello(Role.DATA, 1, 0)) is Verdict.TAKEN
        one.abort(TransportClosed("over"))
        with pytest.raises(TransportClosed):
            work.wait(SOON_S)
        other.abort(TransportClosed("over"))
        go_on.set()
        eventually(lambda: not lane_threads())


FAULT_IN_A_TRANSFER = """
    import barepp, os, signal, time, torch
    with barepp.init() as world:
        big = torch.zeros(2**28, dtype=torch.uint8)
        if world.rank == 1:
            world.isend(torch.tensor(os.getpid()), 0)
            world.isend(big.fill_(1), 0)
        elif world.rank == 0:
            other = int(world.recv(1))
            arriving = world.irecv(1, into=big)
            while not big[0]:
                time.sleep(0.0001)
            os.kill(other, signal.{signal})
            arriving.wait()
        world.recv((world.rank + 1) % 3)   # nobody sends any more
"""


@pytest.mark.parametrize(
    ("fault", "code", "cause"), [("SIGKILL", 137, "killed by SIGKILL"), ("SIGSTOP", 124, "stopped")]
)
def test_a_rank_that_dies_or_stops_in_the_midst_of_its_payload(
    fault: str, code: int, cause: str, tmp_path: Path
) -> None:
    with nothing_left():
        script = FAULT_IN_A_TRANSFER.format(signal=fault)
        job = run_job(tmp_path, script, 3, transport="gloo", heartbeat_s=2.0, grace_s=2.0)
    assert job.code == code
    assert job.failed["rank"] == 1 and cause in job.failed["message"]
    for rank in (0, 2):
        assert f"barepp: rank {rank} was told while waiting for a message from rank" in job.report


def test_a_death_in_training() -> None:
    outcome = run_with_fault(
        train,
        world=3,
        rank=1,
        at="1B2",
        when="during",
        fault="SIGKILL",
        transport="gloo",
        fork=True,
    )
    outcome.check(told_within_s=5.0, ended_within_s=10.0)


def train(world: barepp.World) -> None:
    pipe = barepp.Pipeline(
        world, barepp.mlp(6, 512, 512, 3), torch.nn.functional.cross_entropy, num_microbatches=4
    )
    for _ in range(2):
        pipe.step(torch.ones(256, 512), torch.zeros(256, dtype=torch.int64))


# -- what two ranks tell each other ----------------------------------------------------------------


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    for sock in pair:
        sock.settimeout(SOON_S)
    yield pair
    for sock in pair:
        sock.close()


def test_a_store_tells_its_values_and_leaves_the_frames_behind_them(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    mine, theirs = (PairStore(sock) for sock in sockets)
    mine.set("from 0/id", b"\0\xff" * 64)
    theirs.set("from 0/address", b"")
    assert theirs.get("from 0/id") == b"\0\xff" * 64
    mine.wait(["from 0/address"])
    assert mine.check(["from 0/id", "from 0/address"]) and not mine.check(["from 1/id"])
    closing = start(mine.close)
    mine_after = b"the first frame"
    theirs.close()
    closing.result(SOON_S)
    sockets[0].sendall(mine_after)
    assert sockets[1].recv(100) == mine_after
    mine.set("later", b"1")  # torch may go on to use it; nobody is told
    assert mine.get("later") == b"1"
    with pytest.raises(RuntimeError, match="nobody tells 'other' any more"):
        mine.get("other")


def note(data: bytes) -> bytes:
    return encode(FrameKind.RECORD, 0, Packed(data, zlib.crc32(data)))


@pytest.mark.parametrize(
    ("said", "error", "what"),
    [
        (note(bytes(65537)), ProtocolError, "65537 bytes of metadata are over"),
        (encode(FrameKind.GOODBYE, 0, ["k", b""]), ProtocolError, "not a key and a value"),
        (note(b"\x92\xa1k\1"), ProtocolError, "not a key and a value"),
        (note(b"\xc1"), ProtocolError, "not valid msgpack"),
        (note(b"\x92\xa1k\xc4\0")[:-1] + b"\1", ProtocolError, "checksum does not match"),
        (note(b"\x92\xa1k\xc4\0")[:-1], ConnectionError, "hung up"),
        (b"", ConnectionError, "hung up"),
        (b"".join(note(b"\x92\xa1%c\xc4\0" % c) for c in range(70)), ProtocolError, "64 notes"),
    ],
)
def test_a_store_refuses_what_is_no_note(
    said: bytes, error: type[Exception], what: str, sockets: tuple[socket.socket, socket.socket]
) -> None:
    sockets[0].sendall(said)
    sockets[0].shutdown(socket.SHUT_WR)
    with pytest.raises(error, match=what):
        PairStore(sockets[1]).get("address")


# -- nccl, as far as a machine without GPUs can show it --------------------------------------------


def test_nccl_needs_one_gpu_a_rank() -> None:
    book = {rank: Address(f"host {rank // 2}", "", ("", 0)) for rank in range(6)}
    assert [local_gpu(rank, book, 2) for rank in range(6)] == [0, 1, 0, 1, 0, 1]
    with pytest.raises(UnknownTransport, match="one GPU a rank: this host has 2 ranks and 1 GPUs"):
        local_gpu(3, book, 1)


def test_nccl_says_in_a_sentence_why_it_cannot_be_used(tmp_path: Path) -> None:
    reason = NcclTransport.viable()
    if reason is None:
        pytest.skip("this machine has what NCCL needs")
    with pytest.raises(UnknownTransport, match=reason):
        transport_class("nccl")
    job = run_job(tmp_path, "import barepp; barepp.init()", transport="nccl")
    assert job.code == 2 and "Traceback" not in job.report
    assert job.report.startswith("barepp: ranks 0-1 failed: transport 'nccl' cannot be used here")
    assert reason in job.report


class Nowhere:
    """A GPU that holds nothing."""

    device = torch.device("cuda", 1)

    def holds(self, tensor: torch.Tensor) -> bool:
        return False


def test_only_what_moves_gpu_memory_takes_tensors_elsewhere_than_on_the_cpu() -> None:
    for gpu in (None, Nowhere()):  # (meta stands for any other device)
        for check in (prepare, fillable):
            with pytest.raises(InvalidArgument, match="is on meta"):
                check(torch.zeros(1, device="meta"), gpu)
