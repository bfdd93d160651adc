"""Ranks over a network that misbehaves: late and cut bytes change nothing, all else has a name."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import networks
import pytest
import torch
from proxy import Network
from transport_worlds import SOON_S, eventually, on_all_ranks, start
from troubles import Act, Fault, Pace, Part, Spot, Trouble

from transport.errors import (
    AuthenticationError,
    InternalError,
    PeerLost,
    ProtocolError,
    TransportClosed,
    TransportError,
    WaitTimeout,
)
from transport.message.specs import MessageSpec
from transport.sockets import listener, peers
from transport.wire.format import HEADER


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


# -- what changes nothing --------------------------------------------------------------------------


def message(src: int, dst: int, number: int) -> torch.Tensor:
    """Return what `src` sends to `dst` as its message of that number; every one is different."""
    rng = random.Random(f"{src} {dst} {number}")
    size = rng.choice([0, 1, 7, 100, 300])
    return torch.arange(size, dtype=torch.int64) * 1009 + rng.randrange(10**9)


def chatter(rank: Any, seed: int, count: int = 8, timeout: float = SOON_S) -> None:
    """Exchange messages with every other rank, all in a random order, and check each of them."""
    rng = random.Random(f"{seed} {rank.rank}")
    others = [other for other in range(rank.world_size) if other != rank.rank]
    sends = [(dst, number) for dst in others for number in range(count)]
    receives = [(src, number) for src in others for number in range(count)]
    rng.shuffle(sends)
    rng.shuffle(receives)
    for dst, number in sends:
        rank.isend(message(rank.rank, dst, number), dst, number)
    for src, number in receives:
        assert torch.equal(rank.recv(src, number, timeout=timeout), message(src, rank.rank, number))
    rank.close(timeout)


@pytest.mark.parametrize(
    "paces",
    [
        [Pace(1, largest=1)],
        [Pace(2, largest=1, delay_s=0.005)],
        [Pace(3, largest=50, delay_s=0.02)],
        [Pace(4, delay_s=0.2, src=0), Pace(5, largest=9)],  # one rank's bytes come long after
        [Pace(6, delay_s=0.15, src=1, dst=2), Pace(7, delay_s=0.15, src=0, dst=1)],
    ],
    ids=["bytes", "late bytes", "pieces", "one late rank", "two late ways"],
)
def test_late_and_cut_bytes_change_nothing(network: Network, paces: list[Trouble]) -> None:
    with networks.world(network, 3, paces) as ranks:
        on_all_ranks(ranks, lambda rank: chatter(rank, seed=1))
        passed = sum(trail.frames for trail in network.trails())
        assert passed >= 3 * 2 * 8  # through the network, and not around it


@pytest.mark.parametrize("seed", range(25))
def test_first_contact_from_both_sides_however_late_each_word_is(
    network: Network, seed: int
) -> None:
    """Who calls whom is settled by words that cross; every order of their arrival will do."""
    with networks.world(network, 2, [Pace(seed, largest=40, delay_s=0.03)]) as ranks:
        on_all_ranks(ranks, lambda rank: chatter(rank, seed, count=1))


def test_a_later_message_of_one_peer_overtakes_an_earlier_one_of_another(network: Network) -> None:
    held = Fault(Act.STALL, Spot(Part.META, 3), src=0, dst=2)
    with networks.world(network, 3, [held]) as ranks:
        early, late = message(0, 2, 3), message(1, 2, 3)
        ranks[0].isend(early, 2)
        with pytest.raises(WaitTimeout):
            ranks[2].recv(0, timeout=0.05)
        ranks[1].isend(late, 2)
        assert torch.equal(ranks[2].recv(1, timeout=SOON_S), late)
        assert network.struck() == [Act.STALL]
        network.release()
        assert torch.equal(ranks[2].recv(0, timeout=SOON_S), early)


# -- what breaks a stream --------------------------------------------------------------------------

PARTS = [
    Spot(Part.HEADER, 0, 1),
    Spot(Part.HEADER, 13, 1),
    Spot(Part.HEADER, HEADER.size - 1, 1),
    Spot(Part.META, 0, 1),
    Spot(Part.META, 9, 1),
    Spot(Part.PAYLOAD, 0, 1),
    Spot(Part.PAYLOAD, 700_000, 1),
]
FIRST, SECOND = torch.arange(5.0), torch.arange(100_000)  # the second one is hit
MATE = torch.tensor([12.0])


def told(work: Any) -> TransportError:
    with pytest.raises(TransportError) as caught:
        work()
    return caught.value


def send_both(ranks: list[Any]) -> None:
    ranks[0].isend(FIRST, 1, tag=1)
    ranks[0].isend(SECOND, 1, tag=2)


def check_the_others_go_on(ranks: list[Any]) -> None:
    """Rank 2 is no party to what goes wrong between ranks 0 and 1."""
    for rank in (0, 1):
        ranks[2].isend(MATE, rank)
        ranks[rank].isend(MATE, 2)
        assert torch.equal(ranks[rank].recv(2, timeout=SOON_S), MATE)
        assert torch.equal(ranks[2].recv(rank, timeout=SOON_S), MATE)


@pytest.mark.parametrize("spot", PARTS, ids=lambda spot: f"{spot.part.name} {spot.offset}")
@pytest.mark.parametrize("act", [Act.RESET, Act.FINISH], ids=lambda act: act.name)
def test_a_stream_that_is_cut_off(network: Network, act: Act, spot: Spot) -> None:
    """What came whole is kept, what was torn is an error on both sides, and nobody else cares."""
    with networks.world(network, 3, [Fault(act, spot, src=0, dst=1)]) as ranks:
        send_both(ranks)
        error = told(lambda: ranks[1].recv(0, 2, timeout=SOON_S))
        assert network.struck() == [act]
        where = "without a goodbye" if spot.offset == 0 and spot.part is Part.HEADER else "in the m"
        assert isinstance(error, PeerLost)
        assert f"the connection to rank 0 ended {where}" in str(error)
        assert torch.equal(ranks[1].recv(0, 1, timeout=SOON_S), FIRST)
        error = told(lambda: ranks[0].recv(1, timeout=SOON_S))
        assert isinstance(error, PeerLost)
        assert "the connection to rank 1 ended without a goodbye" in str(error)
        check_the_others_go_on(ranks)


@pytest.mark.parametrize("spot", PARTS, ids=lambda spot: f"{spot.part.name} {spot.offset}")
def test_a_stream_that_stands_still_and_goes_on(network: Network, spot: Spot) -> None:
    with networks.world(network, 3, [Fault(Act.STALL, spot, src=0, dst=1)]) as ranks:
        send_both(ranks)
        assert torch.equal(ranks[1].recv(0, 1, timeout=SOON_S), FIRST)
        assert isinstance(told(lambda: ranks[1].recv(0, 2, timeout=0.05)), WaitTimeout)
        assert network.struck() == [Act.STALL]
        check_the_others_go_on(ranks)
        network.release()
        assert torch.equal(ranks[1].recv(0, 2, timeout=SOON_S), SECOND)


def test_what_queues_up_before_a_stream_that_stands_still_comes_whole(network: Network) -> None:
    """More than all buffers between the ranks hold; each frame small enough to be sent at once."""
    small = torch.arange(480)
    with networks.world(network, 2, [Fault(Act.STALL, Spot(Part.META, 2, 1), 0, 1)]) as ranks:
        works: list[Any] = []
        while len(works) < 1000 or works[-100].done:  # until a hundred are queued
            works.append(ranks[0].isend(small + len(works), 1))
        network.release()
        for number in range(len(works)):
            assert torch.equal(ranks[1].recv(0, timeout=SOON_S), small + number)
        works[-1].wait(SOON_S)


META_NBYTES = len(MessageSpec.of(SECOND).packed.data)
HEAD = [(Part.HEADER, at) for at in range(HEADER.size)] + [
    (Part.META, at) for at in range(META_NBYTES)
]


@pytest.mark.parametrize(("part", "offset"), HEAD, ids=lambda value: str(value))
def test_a_flipped_bit_of_head_or_metadata(network: Network, part: Part, offset: int) -> None:
    bit = random.Random(f"{part} {offset}").randrange(8)
    flip = Fault(Act.FLIP, Spot(part, offset, 1), src=0, dst=1, bit=bit)
    with networks.world(network, 2, [flip]) as ranks:
        send_both(ranks)
        error = told(lambda: ranks[1].recv(0, 2, timeout=SOON_S))
        assert network.struck() == [Act.FLIP]
        assert isinstance(error, ProtocolError)
        assert re.match("from rank 0: .*(checksum|starts with)", str(error))
        assert torch.equal(ranks[1].recv(0, 1, timeout=SOON_S), FIRST)
        error = told(lambda: ranks[0].recv(1, timeout=SOON_S))
        assert isinstance(error, PeerLost) and "rank 1" in str(error)


PAYLOADS = {
    "int64": torch.arange(1000),
    "odd": torch.arange(11, dtype=torch.uint8),  # what is left over at the end counts as well
    "bool": torch.ones(3, dtype=torch.bool),
    "tuple": (torch.ones(3), torch.arange(5, dtype=torch.int16)),
    "large": torch.ones(300_000),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("asked", ["before", "afterwards"])
def test_a_flipped_bit_of_a_payload_that_has_a_sum(
    network: Network, name: str, where: float, asked: str
) -> None:
    payload = PAYLOADS[name]
    offset = int(where * (MessageSpec.of(payload).nbytes - 1))
    bit = random.Random(f"{name} {where}").randrange(8)
    flip = Fault(Act.FLIP, Spot(Part.PAYLOAD, offset, 1), src=0, dst=1, bit=bit)
    with networks.world(network, 2, [flip], checksum=True) as ranks:
        ranks[0].isend(FIRST, 1, tag=1)
        assert torch.equal(ranks[1].recv(0, 1, timeout=SOON_S), FIRST)
        receive = ranks[1].irecv(0, 2) if asked == "before" else None
        ranks[0].isend(payload, 1, tag=2)
        if receive is None:
            eventually(lambda: network.struck() == [Act.FLIP])
            receive = ranks[1].irecv(0, 2)
        error = told(lambda: receive.wait(SOON_S))
        assert network.struck() == [Act.FLIP]
        assert isinstance(error, ProtocolError)
        assert str(error).startswith("from rank 0: the payload's sum is")
        assert "the message with tag 2 changed on the way" in str(error)
        assert isinstance(told(lambda: ranks[0].recv(1, timeout=SOON_S)), PeerLost)


def test_a_goodbye_that_is_torn_or_changed_is_none(network: Network) -> None:
    for act, kind in ((Act.FLIP, ProtocolError), (Act.RESET, PeerLost), (Act.FINISH, PeerLost)):
        fault = Fault(act, Spot(Part.HEADER, 6, 1), src=0, dst=1)
        with networks.world(network, 2, [fault]) as ranks:
            ranks[0].isend(FIRST, 1)
            leaving = start(lambda: ranks[0].close(SOON_S))
            assert torch.equal(ranks[1].recv(0, timeout=SOON_S), FIRST)
            error = told(lambda: ranks[1].recv(0, timeout=SOON_S))
            assert isinstance(error, kind) and "rank 0" in str(error)
            assert network.struck() == [act]
            leaving.result(SOON_S)  # it had said all that it had to say


# -- before the first frame ------------------------------------------------------------------------

MAGIC, RANK, NONCE, PROOF = 0, 8, 40, 70  # offsets in what the caller says
CHALLENGE, ANSWER, VERDICT = 0, 40, 64  # and in what it is told


@pytest.mark.parametrize(
    ("src", "offset", "act"),
    [
        (0, MAGIC, Act.FLIP),
        (0, PROOF, Act.FLIP),
        *[(0, at, act) for at in (MAGIC, NONCE, PROOF) for act in Act if act is not Act.FLIP],
        *[(1, at, act) for at in (CHALLENGE, ANSWER) for act in (Act.RESET, Act.FINISH)],
    ],
)
def test_a_call_that_failed_by_accident_is_made_again(
    network: Network, monkeypatch: pytest.MonkeyPatch, src: int, offset: int, act: Act
) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_TIMEOUT_S", 0.1)
    with networks.world(network, 2, [hit(src, offset, act)]) as ranks:
        ranks[0].isend(SECOND, 1)  # so it is rank 0 who calls
        assert torch.equal(ranks[1].recv(0, timeout=SOON_S), SECOND)
        ranks[1].isend(FIRST, 0)
        assert torch.equal(ranks[0].recv(1, timeout=SOON_S), FIRST)
        assert network.struck() == [act]


NO_PROOF = "calling rank 1: the listener could not prove that it holds the secret"
NO_ANSWER = "rank 1 did not answer within 0.2 s"
REFUSED = "rank 1 refuses this rank's call"


def hit(src: int, offset: int, act: Act, bit: int = 0, times: int = 1) -> Fault:
    return Fault(act, Spot(Part.HANDSHAKE, offset), src, 1 - src, bit, times)


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        (hit(0, RANK, Act.FLIP, 1), AuthenticationError, NO_PROOF),
        (hit(0, NONCE, Act.FLIP, 1), AuthenticationError, NO_PROOF),
        (hit(1, CHALLENGE, Act.FLIP), AuthenticationError, NO_PROOF),
        (hit(1, ANSWER, Act.FLIP), AuthenticationError, NO_PROOF),
        (hit(1, VERDICT, Act.FLIP, 0), AuthenticationError, "calling rank 1: verdict 0 does not"),
        (hit(1, VERDICT, Act.FLIP, 1), PeerLost, REFUSED),
        (hit(1, VERDICT, Act.RESET), PeerLost, REFUSED),
        (hit(1, VERDICT, Act.FINISH), PeerLost, REFUSED),
        (hit(1, CHALLENGE, Act.STALL), PeerLost, NO_ANSWER),
        (hit(1, VERDICT, Act.STALL), PeerLost, NO_ANSWER),
        (hit(0, MAGIC, Act.FLIP, times=999), PeerLost, NO_ANSWER),
        (hit(0, PROOF, Act.FLIP, times=999), PeerLost, NO_ANSWER),
        (hit(0, NONCE, Act.RESET, times=999), PeerLost, NO_ANSWER),
        (hit(0, NONCE, Act.FINISH, times=999), PeerLost, NO_ANSWER),
        (hit(0, NONCE, Act.STALL, times=999), PeerLost, NO_ANSWER),
        (hit(1, ANSWER, Act.RESET, times=999), PeerLost, NO_ANSWER),
    ],
)
def test_a_call_that_never_succeeds(
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    kind: type[TransportError],
    says: str,
) -> None:
    """Both sides are told in time, each with the other's name; and neither is connected to."""
    if says is NO_ANSWER:
        monkeypatch.setattr(peers, "CALL_TIMEOUT_S", 0.2)
    with networks.world(network, 2, [fault]) as ranks:
        work = ranks[0].isend(FIRST, 1)
        error = told(lambda: work.wait(SOON_S))
        assert fault.act in network.struck()
        assert isinstance(error, kind) and says in str(error)
        error = told(lambda: ranks[1].recv(0, timeout=SOON_S))
        assert isinstance(error, (PeerLost, AuthenticationError)) and "rank 0" in str(error)
        assert isinstance(told(lambda: ranks[0].isend(FIRST, 1)), kind)


# -- anything at all -------------------------------------------------------------------------------

SIZES = {Part.HANDSHAKE: 96, Part.HEADER: HEADER.size, Part.META: META_NBYTES, Part.PAYLOAD: 800}


def random_troubles(rng: random.Random, world_size: int) -> list[Trouble]:
    """Return a few faults anywhere, on top of bytes that are late everywhere."""
    found: list[Trouble] = [Pace(rng.randrange(10**6), rng.choice([1, 30, 65536]), 0.01)]
    for _ in range(rng.randrange(1, 4)):
        src, dst = rng.sample(range(world_size), 2)
        act, part = rng.choice(list(Act)), rng.choice(list(Part))
        offset = rng.randrange(SIZES[part])
        frame = rng.randrange(5) if part is not Part.HANDSHAKE else 0
        found.append(Fault(act, Spot(part, offset, frame), src, dst, rng.randrange(8)))
    return found


def right_or_named(rank: Any, seed: int, timeout: float) -> TransportError | None:
    """Chat as above; return the error that ended it. A wrong number fails the test here."""
    try:
        chatter(rank, seed, 5, timeout)
    except TransportError as error:
        rank.abort(TransportClosed("this rank has failed"))
        return error
    return None


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_a_message_is_right_or_its_error_has_a_name(
    network: Network, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(peers, "CALL_TIMEOUT_S", 2.0)
    monkeypatch.setattr(listener, "HANDSHAKE_TIMEOUT_S", 0.3)
    troubles = random_troubles(random.Random(seed), 3)
    stalls = any(isinstance(t, Fault) and t.act is Act.STALL for t in troubles)
    timeout = 1.0 if stalls else SOON_S
    with networks.world(network, 3, troubles, checksum=True) as ranks:
        errors = on_all_ranks(ranks, lambda rank: right_or_named(rank, seed, timeout))
        struck = network.struck()
    for rank, error in enumerate(errors):
        assert error is None or struck
        assert not isinstance(error, InternalError)
        assert stalls or not isinstance(error, WaitTimeout)
        others = "|".join(str(other) for other in range(3) if other != rank)
        assert error is None or re.search(f"ranks? .?({others})", str(error))
