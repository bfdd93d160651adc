"""One job of several launchers, on loopback: what is refused, who fails, and who is told what."""

from __future__ import annotations

import re
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import FAIL, SECRET, Cluster, check_fault
from jobs import listening_at
from starter import Starter, eventually

from barepp.launch.__main__ import main
from barepp.launch.hang_detector import HangDetector
from barepp.launch.hosts.protocol import Link, share
from barepp.worker.heartbeat import Heartbeat
from transport.rendezvous.dial import dial


@pytest.fixture
def cluster(starter: Starter, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(starter, tmp_path)
    yield made
    for launcher in made.launchers:
        launcher.kill()


def test_shares_are_even_and_the_first_are_larger() -> None:
    assert [share(7, 3, node) for node in range(3)] == [range(3), range(3, 5), range(5, 7)]
    for world_size in range(1, 12):
        for count in range(1, world_size + 1):
            shares = [share(world_size, count, node) for node in range(count)]
            assert [rank for part in shares for rank in part] == list(range(world_size))
            sizes = [len(part) for part in shares]
            assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


# -- what is refused before anything starts -------------------------------------------------------

TWO = ["--nodes", "2", "--node-rank", "1", "--rendezvous", "h:1"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nodes", "5"], "from 1 to the number of ranks, 4, not 5"),
        (["--nodes", "0"], "from 1 to the number of ranks, 4, not 0"),
        (["--nodes", "2"], "--nodes 2 needs --node-rank, which of them this is, and --rendezvous"),
        (["--node-rank", "1"], "--node-rank is from 0 to 0 with --nodes 1, not 1"),
        ([*TWO, "--node-rank", "2"], "--node-rank is from 0 to 1 with --nodes 2, not 2"),
        ([*TWO, "--rendezvous", "h"], "--rendezvous is HOST:PORT, or [ADDRESS]:PORT for IPv6"),
        ([*TWO, "--rendezvous", "h:0"], "--rendezvous is HOST:PORT"),
        ([*TWO, "--rendezvous", "::1:5"], "--rendezvous is HOST:PORT"),
        (TWO, "several nodes need a secret that they share: set BAREPP_SECRET_FILE to a file"),
    ],
)
def test_wrong_usage(
    flags: list[str], says: str, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delenv("BAREPP_SECRET", raising=False)
    monkeypatch.delenv("BAREPP_SECRET_FILE", raising=False)
    assert main(["--world", "4", *flags, __file__]) == 2
    error = capfd.readouterr().err
    assert says in error and error.count("\n") == 1


def test_node_0_that_never_comes_is_named(cluster: Cluster) -> None:
    cluster.start("", "--join-timeout", "1", only=[1])
    (end,) = (launcher.wait() for launcher in cluster.launchers)
    assert end.code == 1
    assert re.fullmatch(r"barepp.launch: the rendezvous at .* Connection refused\n", end.err)


# -- on loopback ----------------------------------------------------------------------------------

HEALTHY = """
    import barepp, torch
    with barepp.init() as world:
        for _ in range(2):
            world.barrier()
        if world.rank == 0:
            world.send(torch.ones(2), 2)
        if world.rank == 2:
            print(world.recv(0).tolist(), world.transport.name, "local rank", world.local_rank)
"""


def test_a_healthy_job(cluster: Cluster) -> None:
    first, second = cluster.start(HEALTHY).wait()
    assert (first.code, first.out, first.err) == (0, "", "")
    assert (second.code, second.out, second.err) == (
        0,
        "[rank 2] [1.0, 1.0] shm local rank 0\n",
        "",
    )
    for number, ranks in ((0, [0, 1, 2]), (1, [2])):
        events = cluster.events(number)
        assert {event["event"] for event in events} == {"started", "ended"}
        assert sorted(e["rank"] for e in events if e["event"] == "started") == ranks
        assert sorted(e["rank"] for e in events if e["event"] == "ended") == ranks


@pytest.mark.parametrize(("rank", "fault"), [(2, "os._exit(7)"), (0, "sys.exit(3)")])
def test_one_cause_on_all_nodes(rank: int, fault: str, cluster: Cluster) -> None:
    check_fault(rank, fault, cluster)


@pytest.mark.parametrize("node", [0, 1])
def test_ctrl_c_on_any_node_ends_all(node: int, cluster: Cluster) -> None:
    cluster.start(FAIL.format(rank=2, fault="print('ready', flush=True); time.sleep(60)"))
    eventually(lambda: "ready" in cluster.launchers[1].out)
    pids = [event["pid"] for event in cluster.events(0)]
    assert listening_at([*pids, *(launcher.pid for launcher in cluster.launchers)]) == {"127.0.0.1"}
    cluster.launchers[node].kill(signal.SIGINT)
    for number, end in enumerate(cluster.wait()):
        assert end.code == 130
        assert f"the job failed: node {node}'s launcher received SIGINT" in end.err
        assert cluster.events(number)


WORK = "time.sleep(3); print('rank', world.rank, 'has done its work'); "  # told meanwhile


def test_a_launcher_that_dies_takes_its_ranks_along(cluster: Cluster) -> None:
    cluster.start(FAIL.format(rank=2, fault="print('ready', flush=True); time.sleep(60)"))
    eventually(lambda: "ready" in cluster.launchers[1].out)
    cluster.launchers[1].kill()
    first, second = cluster.wait()
    assert (first.code, second.code) == (1, -9)
    assert "the job failed: node 1 (launcher) lost: its connection ended" in first.err
    for rank in (0, 1):
        assert f"barepp: rank {rank} was told while waiting" in first.err
    assert "barepp: rank 2 is on another node, which does not say how it ended" in first.err


def test_ranks_of_other_nodes_have_their_grace_when_a_launcher_dies(cluster: Cluster) -> None:
    fault = "print('ready', flush=True); time.sleep(60)"
    text = FAIL.format(rank=2, fault=fault).replace("world.recv(2", WORK + "world.recv(2")
    cluster.start(text, "--grace", "30")
    eventually(lambda: "ready" in cluster.launchers[1].out)
    cluster.launchers[1].kill()
    first, _ = cluster.wait()
    assert first.out.count("has done its work") == 2
    for rank in (0, 1):
        assert f"barepp: rank {rank} was told while waiting for a message" in first.err


def test_the_death_of_node_0s_launcher(cluster: Cluster) -> None:
    cluster.start(FAIL.format(rank=2, fault="print('ready', flush=True); world.recv(1)"))
    eventually(lambda: "ready" in cluster.launchers[1].out)
    cluster.launchers[0].kill()
    first, second = cluster.wait()
    assert (first.code, second.code) == (-9, 1)
    assert "the job failed: node 0 (launcher) lost: its connection ended" in second.err


def test_ranks_elsewhere_have_their_grace_when_node_0s_launcher_dies(cluster: Cluster) -> None:
    fault = "print('ready', flush=True); " + WORK + "world.recv(1)"
    cluster.start(FAIL.format(rank=2, fault=fault), "--grace", "30")
    eventually(lambda: "ready" in cluster.launchers[1].out)
    cluster.launchers[0].kill()
    _, second = cluster.wait()
    assert second.out.count("has done its work") == 1
    told = "barepp: rank 2 was told while waiting for a message from rank 1 with tag 0, and ended"
    assert told in second.err


def test_a_rank_elsewhere_that_alone_loses_node_0_says_so(cluster: Cluster) -> None:
    fault = "cut(world); world.recv(0)"
    text = "cut = lambda world: world._control._stream.socket.shutdown(2)\n"
    ended = cluster.start(text + textwrap.dedent(FAIL.format(rank=2, fault=fault))).wait()
    for end in ended:
        assert end.code == 1
        says = "rank 2 failed while waiting for a message from rank 0 with tag 0: its control"
        assert f"{says} connection to the launcher broke" in end.err


def test_a_node_that_never_comes_is_named(cluster: Cluster) -> None:
    cluster.start(HEALTHY, "--join-timeout", "1", only=[0])
    (end,) = cluster.wait()
    assert end.code == 1
    assert "2 of 3 ranks joined within 1 s; missing: rank 2 (node 1 has not come)" in end.err


def test_a_node_that_never_comes_is_not_waited_for_without_a_world(cluster: Cluster) -> None:
    cluster.start("print('nobody else is needed')", "--join-timeout", "1", only=[0])
    (end,) = cluster.wait()
    assert end.code == 1
    assert "have ended, and nobody else has come within 1 s (node 1 has not come)" in end.err
    assert end.err.count(" had ended well") == 2


@pytest.mark.parametrize("script", ["nowhere.py", "broken.py"])
def test_a_node_that_starts_nothing_says_why(script: str, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def")
    cluster.start(HEALTHY, only=[0]).start(HEALTHY, only=[1], script=str(tmp_path / script))
    first, second = cluster.wait()
    what = "does not exist" if script == "nowhere.py" else "is not valid Python: "
    why = f"the script {tmp_path / script} {what}"
    assert (first.code, second.code) == (2, 2)
    assert f"the job failed: node 1 starts nothing: {why}" in first.err
    assert f"barepp.launch: {why}" in second.err and second.err.count("\n") == 1
    assert re.search(
        "rank 0 was told while waiting for all ranks to join|rank 0 .*ended", first.err
    )


def test_a_node_that_comes_after_the_failure_is_told(cluster: Cluster) -> None:
    stay = "import barepp.launch.hosts.head as head\n"
    stay += "head.STAY_S = head.LAST_REPORTS_S = 30.0\n"
    cluster.start("raise ImportError('no such module')", only=[0], prelude=stay)
    history = cluster.log_dir(0) / "events.jsonl"
    eventually(lambda: history.exists() and history.read_text().count('"ended"') == 2)
    cluster.start("import time; time.sleep(60)", only=[1])
    for end in cluster.wait():
        assert end.code == 1
        assert "failed: ImportError: no such module" in end.err


NO_FORK = """
import errno, os
import barepp.launch.job
def start(self, process):
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
barepp.launch.job.ForkServer.start = start
"""


@pytest.mark.parametrize("node", [0, 1])
def test_a_rank_that_cannot_be_started_is_told_on_all_nodes(node: int, cluster: Cluster) -> None:
    cluster.start(HEALTHY, only=[0], prelude=NO_FORK if node == 0 else "")
    cluster.start(HEALTHY, only=[1], prelude=NO_FORK if node == 1 else "")
    rank = 2 if node else 0
    for end in cluster.wait():
        assert end.code == 2
        says = f"the job failed: rank {rank} cannot be started on node {node}: Resource temporarily"
        assert says in end.err and "Traceback" not in end.err


def test_a_second_node_1_is_refused(cluster: Cluster) -> None:
    cluster.start(FAIL.format(rank=2, fault="print('ready', flush=True); time.sleep(60)"))
    eventually(lambda: "ready" in cluster.launchers[1].out)
    cluster.start("", only=[1])
    again = cluster.launchers[2].wait()
    assert again.code == 1 and "node 1 has come already" in again.err
    cluster.launchers[0].kill(signal.SIGINT)
    assert [end.code for end in cluster.wait()[:2]] == [130, 130]


def test_launchers_that_disagree_are_told_both_sides(cluster: Cluster) -> None:
    cluster.start(HEALTHY, only=[0]).start(HEALTHY, only=[1], world=4)
    says = "node 1 was started with --world 4 --nodes 2, node 0 with --world 3 --nodes 2"
    for end in cluster.wait():
        assert end.code == 1 and says in end.err


def test_another_secret_is_not_let_in(cluster: Cluster) -> None:
    cluster.start(HEALTHY, only=[0])
    other = {"BAREPP_SECRET": "another one of 16 characters"}
    cluster.start(HEALTHY, "--join-timeout", "2", only=[1], environ=other)
    assert "does it serve another job?" in cluster.launchers[1].wait().err
    cluster.launchers[0].kill(signal.SIGINT)
    assert cluster.launchers[0].wait().code == 130


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"record": "obey"}, "it sent nonsense: there is no record {'record': 'obey'}"),
        (
            {"record": "ended", "rank": 0, "status": 0, "killed": False},
            "it sent nonsense: rank 0 is not on node 1",
        ),
        ({"record": "failed", "failure": 7}, "it sent nonsense: a failure record is a map"),
        ({"record": "bye"}, "it sent nonsense: it says goodbye before its ranks have ended"),
        (None, "its connection ended"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_lost(
    record: dict[str, Any] | None, says: str, cluster: Cluster
) -> None:
    cluster.start(HEALTHY, only=[0])
    where, secret = ("127.0.0.1", cluster.port), SECRET["BAREPP_SECRET"].encode()
    link = Link(dial(where, secret, -2, time.monotonic() + 60.0, patient=True), 0.0)
    if record is not None:
        link.send(record)
    else:
        link.close()
    (end,) = cluster.wait()
    assert end.code == 1
    assert f"the job failed: node 1 (launcher) lost: {says}" in end.err
    link.close()


def test_a_deadlock_across_nodes_is_proven(cluster: Cluster) -> None:
    """Although the clock of rank 2 is far ahead."""
    text = """
        import barepp, time
        ahead_s, usual = 0.0, time.monotonic
        time.monotonic = lambda: usual() + ahead_s
        with barepp.init() as world:
            ahead_s = 1e6 if world.rank == 2 else 0.0
            world.recv((world.rank + 1) % 3)
    """
    ended = cluster.start(text).wait()
    for end, rank in zip(ended, (0, 2), strict=True):
        assert end.code == 124
        assert f"barepp: the Python stack of rank {rank}:\n      File" in end.err
        assert "a deadlock: every rank waits, and no message is on its way" in end.err


def test_the_clocks_of_other_hosts_prove_nothing() -> None:
    def beat(made_at: float, moved: int) -> Heartbeat:
        return Heartbeat(made_at, "", (1,), True, {0: moved}, {0: moved})

    def watch(*, overlap: bool) -> HangDetector:
        made = HangDetector(range(2), 10.0, 0.0)
        for second in range(4):
            # Rank 1's clock is far ahead. Its last beat was made after 1.5 s of ours, or after 0.5.
            made.beat(0, beat(float(second), 0), float(second), after=second - 0.5)
            after = second - 0.5 if overlap else 0.5
            made.beat(1, beat(1e6 + second, 0), second + 0.1, after=after)
        return made

    assert watch(overlap=True).check(4.0) is not None
    assert watch(overlap=False).check(4.0) is None
