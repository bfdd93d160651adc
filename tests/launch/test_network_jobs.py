"""Whole jobs over a network that misbehaves: the same bits, or one cause that names a rank."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import networks
import pytest
import torch._dynamo  # noqa: F401  (the first backward imports it; ranks inherit it)
from jobs import Finished, nothing_left, run_job
from proxy import Network
from troubles import RENDEZVOUS, Act, Fault, Pace, Part, Spot, Trouble

# (torch's own optimizers import its compiler, which takes seconds.)
TRAIN = """
    import barepp, torch
    with barepp.init() as world:
        pipe = barepp.Pipeline(
            world,
            barepp.mlp(5, 24),
            torch.nn.functional.cross_entropy,
            schedule="1f1b",
            num_microbatches=4,
        )
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(16, 64, generator=generator)
            labels = torch.randint(0, 10, (16,), generator=generator)
            pipe.zero_grad()
            pipe.step(images, labels)
            with torch.no_grad():
                for parameter in pipe.parameters():
                    parameter -= 0.1 * parameter.grad
            world.barrier()
        print(pipe.parameters_sha256())
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


@functools.cache
def undisturbed() -> list[str]:
    """Return what one process learns."""
    with tempfile.TemporaryDirectory() as folder:
        [sha256] = run_job(Path(folder), TRAIN, 1).said(0)
    assert re.fullmatch("[0-9a-f]{64}", sha256)
    return [sha256]


@pytest.mark.parametrize(
    "paces",
    [
        [Pace(1, largest=1)],
        [Pace(2, largest=1, delay_s=0.004)],
        [Pace(3, largest=60, delay_s=0.04)],
        [Pace(4, delay_s=0.08, src=0), Pace(5, largest=7)],
        [Pace(6, delay_s=0.2, src=RENDEZVOUS), Pace(7, delay_s=0.2, dst=RENDEZVOUS)],
        [Pace(8, delay_s=0.08, src=2, dst=1), Pace(9, largest=1, dst=RENDEZVOUS)],
    ],
    ids=["bytes", "late bytes", "pieces", "a late rank", "late control", "late gradients"],
)
def test_late_and_cut_bytes_change_no_bit_of_what_is_learnt(
    network: Network, tmp_path: Path, paces: list[Trouble]
) -> None:
    job = networks.job(network, tmp_path, TRAIN, 3, paces)
    assert job.code == 0, job.err
    assert [job.said(rank) for rank in range(3)] == [undisturbed()] * 3
    ways = {(trail.src, trail.dst) for trail in network.trails() if trail.frames}
    assert {(0, 1), (1, 2), (2, 1), (1, 0), (0, RENDEZVOUS), (RENDEZVOUS, 2)} <= ways


def test_a_call_that_fails_by_accident_changes_no_bit(network: Network, tmp_path: Path) -> None:
    hello, proof = Spot(Part.HANDSHAKE, 3), Spot(Part.HANDSHAKE, 80)
    faults = [Fault(Act.RESET, hello, times=3), Fault(Act.FINISH, proof, times=3)]
    job = networks.job(network, tmp_path, TRAIN, 3, faults)
    assert job.code == 0, job.err
    assert [job.said(rank) for rank in range(3)] == [undisturbed()] * 3
    assert sorted(network.struck(), key=str) == [Act.FINISH] * 3 + [Act.RESET] * 3


def check_told(job: Finished, world_size: int = 3) -> None:
    """Nobody ends well or prints a result; whoever has a line of its own is told apart."""
    ended = {event["rank"]: event["exit_code"] for event in job.events if event["event"] == "ended"}
    assert sorted(ended) == list(range(world_size)) and all(ended.values())
    assert not any(job.said(rank) for rank in range(world_size))
    assert job.report.startswith("barepp: ")


MIDDLE = [Spot(Part.HEADER, 20, 9), Spot(Part.META, 3, 9), Spot(Part.PAYLOAD, 100, 9)]


@pytest.mark.parametrize(
    ("act", "spot"),
    [
        *[(Act.RESET, spot) for spot in MIDDLE],
        (Act.FINISH, MIDDLE[2]),
        *[(Act.FLIP, spot) for spot in MIDDLE],
    ],
    ids=lambda value: value.name if isinstance(value, Act) else value.part.name,
)
def test_a_data_connection_that_breaks(
    network: Network, tmp_path: Path, act: Act, spot: Spot
) -> None:
    """The activations from rank 1 to rank 2 are hit: one of the two says so, and names the other.

    A cut is seen on both sides at once. A changed bit is seen by its receiver, so that is who
    the cause is found on.
    """
    with nothing_left():
        fault = Fault(act, spot, src=1, dst=2, bit=5)
        job = networks.job(network, tmp_path, TRAIN, 3, [fault], checksum=True)
    assert network.struck() == [act]
    assert job.code == 1
    failed, message = job.failed["rank"], job.failed["message"]
    if act is Act.FLIP:
        part = {Part.HEADER: "header's checksum", Part.META: "metadata's checksum"}
        assert (failed, job.failed["cause"]) == (2, "exception")
        says = part.get(spot.part, "payload's sum is")
        assert f"ProtocolError: from rank 1: the {says}" in message
    else:
        assert job.failed["cause"] == "lost"
        assert "PeerLost: the connection to rank" in message
        assert {failed, int(re.search(r"rank (\d)", message)[1])} <= {0, 1, 2}  # type: ignore[index]
        assert re.search("connection to rank 1 ended in the middle of a frame", job.report)
    check_told(job)


def test_sums_of_payloads_change_no_bit_either(network: Network, tmp_path: Path) -> None:
    pace = Pace(10, largest=60, delay_s=0.004)
    job = networks.job(network, tmp_path, TRAIN, 3, [pace], checksum=True)
    assert job.code == 0, job.err
    assert [job.said(rank) for rank in range(3)] == [undisturbed()] * 3


def test_without_sums_a_changed_bit_of_a_payload_is_learnt_from(
    network: Network, tmp_path: Path
) -> None:
    """What `--checksum` is for: nobody else looks at a payload's bytes."""
    flip = Fault(Act.FLIP, Spot(Part.PAYLOAD, 103, 9), src=1, dst=2, bit=6)
    job = networks.job(network, tmp_path, TRAIN, 3, [flip])
    assert network.struck() == [Act.FLIP]
    assert job.code == 0
    assert job.said(0) == job.said(2) != undisturbed()


@pytest.mark.parametrize("spot", MIDDLE[::2], ids=lambda spot: spot.part.name)
def test_a_data_connection_that_stands_still(network: Network, tmp_path: Path, spot: Spot) -> None:
    """Not a deadlock, since a message is on its way: the limit for "nothing moves" finds it."""
    stall = Fault(Act.STALL, spot, src=1, dst=2)
    with nothing_left():
        job = networks.job(network, tmp_path, TRAIN, 3, [stall], timeout_s=1.0)
    assert network.struck() == [Act.STALL]
    assert (job.code, job.failed["cause"]) == (124, "hang")
    assert "no progress on any rank for 1 s" in job.failed["message"]
    assert "rank 2 waits for rank 1: waiting for the input of 2F" in job.failed["message"]
    check_told(job)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (Act.FLIP, "its control connection sent nonsense: the metadata's checksum does not match"),
        (Act.RESET, "its control connection to the launcher broke"),
        (Act.FINISH, "its control connection to the launcher broke"),
        (Act.STALL, "no sign of life for 1"),
    ],
    ids=lambda value: value.name if isinstance(value, Act) else "",
)
def test_a_control_connection_that_breaks_on_its_way_to_the_launcher(
    network: Network, tmp_path: Path, act: Act, says: str
) -> None:
    fault = Fault(act, Spot(Part.META, 3, 3), src=1, dst=RENDEZVOUS)
    limit = 1.5 if act is Act.STALL else 10.0
    with nothing_left():
        job = networks.job(network, tmp_path, TRAIN, 3, [fault], heartbeat_s=limit)
    assert network.struck() == [act]
    assert job.failed["rank"] == 1
    assert says in job.failed["message"]
    assert job.code == (124 if act is Act.STALL else 1)
    check_told(job)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (Act.FLIP, "what the launcher says to it makes no sense: the metadata's checksum"),
        (Act.RESET, "its control connection to the launcher broke"),
        (Act.FINISH, "its control connection to the launcher broke"),
    ],
    ids=lambda value: value.name if isinstance(value, Act) else "",
)
def test_a_control_connection_that_breaks_on_its_way_from_the_launcher(
    network: Network, tmp_path: Path, act: Act, says: str
) -> None:
    fault = Fault(act, Spot(Part.META, 3, 3), src=RENDEZVOUS, dst=1)
    with nothing_left():
        job = networks.job(network, tmp_path, TRAIN, 3, [fault])
    assert network.struck() == [act]
    assert (job.code, job.failed["rank"]) == (1, 1)
    assert says in job.failed["message"]
    check_told(job)
