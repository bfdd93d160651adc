"""One job on two hosts: network namespaces of this machine, with a wire that can fail between."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clusters import FAIL, FAULTS, SECRET, TRAIN, Cluster, check_fault, the_digest
from hosts import IPV4, IPV6, Hosts, enter
from jobs import LIMIT_S, ROOT, write_script
from ports import free_port
from starter import Started, Starter, eventually

from barepp.launch.hosts.protocol import Link

LOADED_S = 3.0  # what a machine that does other things too may take longer


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as made:
        if made.why_not:
            pytest.skip(made.why_not)
        yield made


@pytest.fixture
def wired(starter: Starter, hosts: Hosts, tmp_path: Path) -> Iterator[Cluster]:
    hosts.wire()
    made = Cluster(starter, tmp_path, hosts)
    yield made
    for launcher in made.launchers:
        launcher.kill()


def test_the_same_bits_across_a_slow_wire(wired: Cluster, hosts: Hosts, undisturbed: str) -> None:
    hosts.wire(delay_s=0.02)
    ended = wired.start(TRAIN, world=4).wait()
    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    assert the_digest(ended[0].out) == undisturbed
    said = ended[0].out + ended[1].out
    for rank, kinds in enumerate(
        ("{1: 'AF_UNIX'}", "{0: 'AF_UNIX', 2: 'AF_INET'}", "{1: 'AF_INET', 3: 'AF_UNIX'}")
    ):
        assert re.search(rf"family {rank} .*{re.escape(kinds[1:-1])}", said), said
    assert "is not encrypted: use a network that you trust" in ended[0].err
    assert ended[1].err == ""


def test_the_same_bits_over_ipv6_with_lost_packets(
    wired: Cluster, hosts: Hosts, undisturbed: str
) -> None:
    hosts.wire(loss=0.05)
    ended = wired.start(TRAIN, world=2, name=f"[{IPV6[0]}]").wait()
    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    assert the_digest(ended[0].out) == undisturbed


def test_the_same_bits_over_gloo_between_hosts(wired: Cluster, undisturbed: str) -> None:
    """Node 0's ranks have met the others over loopback, where gloo of node 1 does not find them."""
    ended = wired.start(TRAIN, "--transport", "gloo", world=3).wait()
    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    assert the_digest(ended[0].out) == undisturbed


def test_a_host_that_vanished_is_told_as_such_also_by_whoever_sends_first(hosts: Hosts) -> None:
    """The kernel tells once why a connection has ended, and that may be when a beat is sent."""
    hosts.wire()

    def made(net: str, make: Callable[[], socket.socket]) -> socket.socket:
        with ThreadPoolExecutor(1, initializer=enter, initargs=(net,)) as there:
            return there.submit(make).result()

    where = IPV4[0], free_port()
    with (
        made(hosts.nets[0], lambda: socket.create_server(where)),
        made(hosts.nets[1], lambda: socket.create_connection(where)) as sock,
    ):
        sock.setblocking(False)
        link = Link(sock, 0.5)
        hosts.wire(loss=1.0)
        link.send({"record": "beat"})
        poll = select.poll()
        poll.register(sock, 0)
        assert poll.poll(LIMIT_S * 1e3)
        link.send({"record": "beat"})
        link.send({"record": "beat"})
        assert link.receive() == [] and link.ended == "no sign of life for 0.5 s"


@pytest.mark.parametrize(
    ("how", "then"),
    [
        ("every packet is lost", ""),
        ("every packet is lost", "time.sleep(0.2); world.isend(torch.ones(1), 1); "),
        ("a link is down", ""),
    ],
)
def test_a_cut_wire_is_named_by_both_sides(
    how: str, then: str, wired: Cluster, hosts: Hosts
) -> None:
    """Node 0's own link among them: its ranks are still heard, over loopback.

    Who sends something then loses that rank first, and is told all the same.
    """
    met = "world.send(torch.ones(1), 1); print('ready', flush=True); "
    text = FAIL.replace("import barepp,", "import barepp, torch,")
    wired.start(
        text.format(rank=2, fault=f"{met}{then}world.recv(1)"),
        "--heartbeat",
        "2",
        "--timeout",
        "0",
    )
    eventually(lambda: "ready" in wired.launchers[1].out)
    cut = time.time()
    if how == "a link is down":
        hosts.link(0, up=False)
    hosts.wire(loss=1.0)
    first, second = (launcher.wait() for launcher in wired.launchers)
    hosts.link(0, up=True)
    assert (first.code, second.code) == (1, 1)
    assert "the job failed: node 1 (launcher) lost: no sign of life" in first.err
    assert "the job failed: node 0 (launcher) lost: no sign of life for 2 s" in second.err
    for rank in (0, 1):
        assert f"barepp: rank {rank} was told while waiting for a message" in first.err
    assert "barepp: rank 2 was told while waiting for a message from rank 1" in second.err
    for number in range(2):
        (failed,) = (e for e in wired.events(number) if e.get("primary"))
        assert failed["cause"] == "lost"
        assert failed["time"] - cut < 2 + 1 + LOADED_S  # within the heartbeat, and up to a second


@pytest.mark.parametrize(("rank", "fault"), FAULTS)
def test_one_cause_on_both_hosts(rank: int, fault: str, wired: Cluster, hosts: Hosts) -> None:
    hosts.wire(delay_s=0.02)
    check_fault(rank, fault, wired)


@pytest.mark.parametrize("fault", ["os.kill(os.getpid(), 9)", "raise ValueError('boom')"])
def test_one_cause_on_both_hosts_over_gloo(fault: str, wired: Cluster, hosts: Hosts) -> None:
    hosts.wire(delay_s=0.02)
    # The payload paths are open when the fault comes: each rank has a group with each neighbour.
    talk = (
        "world.barrier(); world.isend(torch.ones(9), (world.rank + 1) % 3); "
        "world.recv((world.rank - 1) % 3)"
    )
    text = FAIL.replace("import barepp,", "import barepp, torch,").replace("world.barrier()", talk)
    check_fault(2, fault, wired, "--transport", "gloo", text=text)


def test_a_stopped_rank_is_named_on_both_hosts(wired: Cluster, hosts: Hosts) -> None:
    hosts.wire(delay_s=0.02)
    text = FAIL.format(rank=2, fault="os.kill(os.getpid(), signal.SIGSTOP)")
    for number, end in enumerate(wired.start(text, "--heartbeat", "2").wait()):
        assert end.code == 124
        assert "rank 2 failed: no sign of life for 2 s" in end.err
        (failed,) = (e for e in wired.events(number) if e.get("primary"))
        assert (failed["rank"], failed["cause"]) == (2, "hang")


CONTRACT = [
    "test_messages_of_one_tag_keep_their_order[tcp]",
    "test_matching_in_any_order_of_sends_and_receives[tcp-0]",
    "test_receive_posted_before_or_after_the_arrival[tcp]",
    "test_tuples[tcp-256]",
    "test_short_waits_interrupted_by_timeouts_lose_nothing[tcp]",
    "test_abort_wakes_every_waiter_with_its_error[tcp]",
    "test_peer_that_aborts_is_lost_to_the_others[tcp]",
    "test_a_peer_that_closes_has_left_but_its_messages_are_here[tcp]",
    "test_simultaneous_first_contact[tcp-0]",
    "test_all_to_all_with_checksums[tcp-0]",
]


def test_the_contract_in_short(hosts: Hosts) -> None:
    """All of it takes minutes: `pytest tests/transport -k "contract and tcp" --wire 0.02`."""
    file = ROOT / "tests/transport/test_transport_contract.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--wire", "0.02"]
    ended = subprocess.run(
        [*command, *(f"{file}::{name}" for name in CONTRACT)],
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len(CONTRACT)} passed" in ended.stdout


# -- started by torchrun ---------------------------------------------------------------------------


def torchruns(
    starter: Starter, hosts: Hosts, folder: Path, text: str, **extra: str
) -> dict[int, Started]:
    """Start four ranks, two on each host, with what torchrun would tell them."""
    script = write_script(folder, text)
    secret = folder / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o600)
    port = free_port()
    return {
        rank: starter.start(
            script,
            {
                "RANK": str(rank),
                "WORLD_SIZE": "4",
                "LOCAL_RANK": str(rank % 2),
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": IPV4[0],
                "MASTER_PORT": str(port - 1),
                "BAREPP_SECRET_FILE": str(secret),
                **extra,
            },
            net=hosts.nets[rank // 2],
        )
        for rank in range(4)
    }


def test_torchruns_ranks_learn_the_same_bits(
    starter: Starter, hosts: Hosts, tmp_path: Path, undisturbed: str
) -> None:
    hosts.wire(delay_s=0.02)
    ranks = torchruns(starter, hosts, tmp_path, TRAIN)
    ended = [started.wait() for started in ranks.values()]
    assert [end.code for end in ended] == [0] * 4, [end.err for end in ended]
    assert the_digest(ended[0].out) == undisturbed
    assert "family 1 {0: 'AF_UNIX', 2: 'AF_INET'" in ended[1].out


TORCHRUNS_FAULTS = {
    # fault: (its exit code, what every other rank is told)
    "os.kill(os.getpid(), 9)": (-9, "it is gone: its control connection ended without a goodbye"),
    "raise ValueError('boom')": (1, "ValueError: boom"),
    "os._exit(7)": (7, "it is gone: its control connection ended without a goodbye"),
    "os.kill(os.getpid(), 19)": (None, "no sign of life for 2 s"),  # SIGSTOP
}


@pytest.mark.parametrize("fault", TORCHRUNS_FAULTS)
def test_torchruns_ranks_are_told_one_cause_on_both_hosts(
    fault: str, starter: Starter, hosts: Hosts, tmp_path: Path
) -> None:
    hosts.wire(delay_s=0.02)
    text = FAIL.format(rank=2, fault=fault)
    ranks = torchruns(starter, hosts, tmp_path, text, BAREPP_HEARTBEAT="2")
    code, says = TORCHRUNS_FAULTS[fault]
    ended = {rank: ranks[rank].wait() for rank in (0, 1, 3)}
    if code is None:
        ranks[2].kill()
    assert ranks[2].wait().code == (code or -9)
    for rank, end in ended.items():
        assert end.code == 1
        waiting = "(at a barrier|for a message from rank 2.*)"
        told = f"barepp: rank {rank} was told while waiting {waiting}: rank 2 failed.*{says}"
        assert re.search(told, end.err), end.err


def test_a_host_of_torchruns_that_vanishes(starter: Starter, hosts: Hosts, tmp_path: Path) -> None:
    hosts.wire()
    script = write_script(
        tmp_path, FAIL.format(rank=1, fault="print('ready', flush=True); world.recv(0)")
    )
    ranks = []
    for rank in range(2):
        environ = {
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NODELIST": "10.77.0.[1-2]",
            "BAREPP_PORT": "29700",
            "BAREPP_HEARTBEAT": "2",
            **SECRET,
        }
        ranks.append(starter.start(script, environ, net=hosts.nets[rank]))
    eventually(lambda: "ready" in ranks[1].out)
    time.sleep(0.6)  # a sign of life of each: who vanishes before is judged by another limit
    hosts.wire(loss=1.0)
    ended = [started.wait() for started in ranks]
    assert [end.code for end in ended] == [1, 1]
    assert "rank 1 failed: no sign of life for 2 s" in ended[0].err
    assert "rank 0, which served the rendezvous, cannot be reached: no sign" in ended[1].err
