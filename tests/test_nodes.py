"""One job on several hosts: launchers on loopback, and two hosts with a wire that can fail."""

from __future__ import annotations

import json
import re
import signal
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import IPV4, IPV6, Hosts
from jobs import listening_at, write_script
from ports import free_port
from starter import Ended, Started, Starter, eventually

from barepp.beats import Beat
from barepp.launch import main
from barepp.nodes import Link, node_of, share
from barepp.watch import Watch
from transport.knock import knock

SECRET = {"BAREPP_SECRET": "a secret of sixteen characters"}
LAUNCH = """
import functools, sys
import barepp.launch
barepp.launch.Job = functools.partial(barepp.launch.Job, fork=True)   # torch is imported already
sys.exit(barepp.launch.main())
"""


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    with Starter() as made:
        yield made


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as made:
        if made.why_not:
            pytest.skip(made.why_not)
        yield made


class Cluster:
    """Launchers of one job, which are nodes of `hosts` or of this host alone."""

    def __init__(self, starter: Starter, folder: Path, hosts: Hosts | None = None) -> None:
        self._starter = starter
        self._hosts = hosts
        self._folder = folder
        self._name = IPV4[0] if hosts is not None else "127.0.0.1"
        self.port = 29500 if hosts is not None else free_port()
        self.launchers: list[Started] = []

    def start(self, text: str, *flags: str, world: int = 3, **options: Any) -> Cluster:
        """Start the launchers of two nodes, or of those in `only`."""
        self._folder.mkdir(exist_ok=True)
        script = write_script(self._folder, text)
        launch = write_script(
            self._folder, options.get("prelude", "") + LAUNCH, f"launch{len(self.launchers)}.py"
        )
        name = options.get("name", self._name)
        for node in options.get("only", (0, 1)):
            arguments = ["--world", str(world), "--nodes", "2", "--node-rank", str(node)]
            arguments += ["--rendezvous", f"{name}:{self.port}", *flags]
            arguments += ["--log-dir", str(self.log_dir(len(self.launchers)))]
            arguments += [options.get("script", str(script))]
            net = self._hosts.nets[node] if self._hosts is not None else ""
            environ: Mapping[str, str] = options.get("environ", SECRET)
            self.launchers.append(self._starter.start(launch, environ, arguments, net))
        return self

    def log_dir(self, number: int) -> Path:
        return self._folder / f"log{number}"

    def events(self, number: int) -> list[dict[str, Any]]:
        text = (self.log_dir(number) / "events.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def wait(self) -> list[Ended]:
        """Wait for all launchers; none of their ranks lives on."""
        ended = [launcher.wait() for launcher in self.launchers]
        numbers = range(len(self.launchers))
        events = [e for n in numbers if self.log_dir(n).exists() for e in self.events(n)]
        pids = [e["pid"] for e in events if e["event"] == "started"]
        eventually(lambda: not any(map(psutil.pid_exists, pids)))
        return ended


@pytest.fixture
def cluster(starter: Starter, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(starter, tmp_path)
    yield made
    for launcher in made.launchers:
        launcher.kill()


@pytest.fixture
def wired(starter: Starter, hosts: Hosts, tmp_path: Path) -> Iterator[Cluster]:
    hosts.wire()
    made = Cluster(starter, tmp_path, hosts)
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
            for node, part in enumerate(shares):
                assert {node_of(world_size, count, rank) for rank in part} == {node}


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


FAIL = """
    import barepp, os, signal, sys, time
    with barepp.init() as world:
        world.barrier()
        if world.rank == {rank}:
            {fault}
        world.recv({rank}, tag=7)
"""


FAULTS = {
    # (rank, fault): (code, cause, what is said)
    (2, "os.kill(os.getpid(), 9)"): (137, "signal", "it was killed by SIGKILL"),
    (2, "os._exit(7)"): (7, "exit", "its process ended with exit code 7"),
    (2, "raise ValueError('boom')"): (1, "exception", "ValueError: boom"),
    (0, "os.kill(os.getpid(), 9)"): (137, "signal", "it was killed by SIGKILL"),
    (0, "sys.exit(3)"): (3, "exit", "it called sys.exit(3)"),
}


@pytest.mark.parametrize(("rank", "fault"), [(2, "os._exit(7)"), (0, "sys.exit(3)")])
def test_one_cause_on_all_nodes(rank: int, fault: str, cluster: Cluster) -> None:
    check_fault(rank, fault, cluster)


@pytest.mark.parametrize(("rank", "fault"), FAULTS)
def test_one_cause_on_both_hosts(rank: int, fault: str, wired: Cluster, hosts: Hosts) -> None:
    hosts.wire(delay_s=0.02)
    check_fault(rank, fault, wired)


def check_fault(rank: int, fault: str, cluster: Cluster) -> None:
    code, cause, says = FAULTS[rank, fault]
    ended = cluster.start(FAIL.format(rank=rank, fault=fault)).wait()
    for number, end in enumerate(ended):
        assert end.code == code
        assert f"barepp: rank {rank} failed: {says}" in end.err
        assert end.err.count("Traceback") == (cause == "exception")
        (failed,) = (e for e in cluster.events(number) if e["event"] == "failed")
        assert (failed["rank"], failed["cause"], failed["primary"]) == (rank, cause, True)
    # Node 0 tells of every rank, the other one of its own.
    words = "was told while waiting (?:at a barrier|for a message from .*), and ended"
    told = [set(re.findall(rf"barepp: rank (\d) {words}", end.err)) for end in ended]
    assert told == [{"0", "1", "2"} - {str(rank)}, {"2"} - {str(rank)}]


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
    stay = "import barepp.head as head; head.STAY_S = head.LAST_REPORTS_S = 30.0\n"
    cluster.start("raise ImportError('no such module')", only=[0], prelude=stay)
    history = cluster.log_dir(0) / "events.jsonl"
    eventually(lambda: history.exists() and history.read_text().count('"ended"') == 2)
    cluster.start("import time; time.sleep(60)", only=[1])
    for end in cluster.wait():
        assert end.code == 1
        assert "failed: ImportError: no such module" in end.err


NO_FORK = """
import errno, os
import barepp.job
def start(self, process):
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
barepp.job.Nursery.start = start
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
    link = Link(knock(where, secret, -2, time.monotonic() + 60.0, patient=True), 0.0)
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
    def beat(made_at: float, moved: int) -> Beat:
        return Beat(made_at, "", (1,), True, {0: moved}, {0: moved})

    def watch(*, overlap: bool) -> Watch:
        made = Watch(range(2), 10.0, 0.0)
        for second in range(4):
            # Rank 1's clock is far ahead. Its last beat was made after 1.5 s of ours, or after 0.5.
            made.beat(0, beat(float(second), 0), float(second), after=second - 0.5)
            after = second - 0.5 if overlap else 0.5
            made.beat(1, beat(1e6 + second, 0), second + 0.1, after=after)
        return made

    assert watch(overlap=True).check(4.0) is not None
    assert watch(overlap=False).check(4.0) is None


# -- two hosts ------------------------------------------------------------------------------------

TRAIN = """
    import barepp, sys, torch
    torch.manual_seed(0)
    inputs, targets = torch.randn(24, 64), torch.randint(0, 10, (24,))
    for schedule in barepp.schedule_names():
        with barepp.init() as world:
            stages = 2 if schedule in ("interleaved_1f1b", "zb_v") else 1
            pipe = barepp.Pipeline(
                world, barepp.mlp(7, 32), torch.nn.functional.cross_entropy, schedule=schedule,
                num_microbatches=4, num_stages=stages * world.world_size, seed=3,
            )
            optimizer = torch.optim.Adam(pipe.parameters(), lr=1e-2)
            for step in range(2):
                pipe.zero_grad()
                pipe.step(inputs, targets)
                optimizer.step()
            digest = pipe.parameters_sha256()
            if world.rank == 0:
                print("sha256", digest)
            peers = getattr(world.transport, "_peers", {}).values()   # (one rank alone has none)
            kinds = {p.connection.peer: p.connection.socket.family.name for p in peers}
            print("family", world.rank, dict(sorted(kinds.items())), flush=True)
"""


def the_digest(text: str) -> str:
    """Return what all schedules come to."""
    digests = re.findall(r"sha256 (\w{64})", text)
    assert len(digests) == 6 and len(set(digests)) == 1
    return str(digests[0])


@pytest.fixture(scope="module")
def undisturbed(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process gets."""
    script = write_script(tmp_path_factory.mktemp("alone"), TRAIN)
    end = starter.start(script, {}).wait()
    assert end.code == 0, end.err
    return the_digest(end.out)


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


@pytest.mark.parametrize("how", ["every packet is lost", "a link is down"])
def test_a_cut_wire_is_named_by_both_sides(how: str, wired: Cluster, hosts: Hosts) -> None:
    """Node 0's own link among them: its ranks are still heard, over loopback."""
    wired.start(
        FAIL.format(rank=2, fault="print('ready', flush=True); world.recv(1)"),
        "--heartbeat",
        "2",
        "--timeout",
        "0",
    )
    eventually(lambda: "ready" in wired.launchers[1].out)
    cut = time.monotonic()
    if how == "a link is down":
        hosts.link(0, up=False)
    hosts.wire(loss=1.0)
    first, second = (launcher.wait() for launcher in wired.launchers)
    lasted_s = time.monotonic() - cut
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
    assert lasted_s < 2 + 10  # both have given the other up; the machine may be loaded


def test_torchrun_on_two_hosts(
    starter: Starter, hosts: Hosts, tmp_path: Path, undisturbed: str
) -> None:
    hosts.wire(delay_s=0.01)
    script = write_script(tmp_path, TRAIN)
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o600)
    ranks = []
    for rank in range(4):
        environ = {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": IPV4[0],
            "MASTER_PORT": "29600",
            "BAREPP_SECRET_FILE": str(secret),
        }
        ranks.append(starter.start(script, environ, net=hosts.nets[rank // 2]))
    ended = [started.wait() for started in ranks]
    assert [end.code for end in ended] == [0] * 4, [end.err for end in ended]
    assert the_digest(ended[0].out) == undisturbed
    assert "family 1 {0: 'AF_UNIX', 2: 'AF_INET'" in ended[1].out


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
