"""Launchers of one job on two nodes, and what may happen to a rank of it; for tests only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from hosts import IPV4, Hosts
from jobs import write_script
from ports import free_port
from starter import Ended, Started, Starter, eventually

SECRET = {"BAREPP_SECRET": "a secret of sixteen characters"}
LAUNCH = """
import functools, sys
from barepp.launch import __main__ as launch
launch.Job = functools.partial(launch.Job, fork=True)   # torch is imported already
sys.exit(launch.main())
"""


def launch_forked(starter: Starter, folder: Path, text: str, *flags: str) -> Ended:
    """Run the launcher's command line on a script's text, with torch imported already."""
    folder.mkdir(exist_ok=True)
    script, launch = write_script(folder, text), write_script(folder, LAUNCH, "launch.py")
    return starter.start(launch, {}, [*flags, str(script)]).wait()


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


def check_fault(rank: int, fault: str, cluster: Cluster, *flags: str, text: str = FAIL) -> None:
    """Run a job in which a rank fails, and see that both nodes name it and all others are told."""
    code, cause, says = FAULTS[rank, fault]
    # (Long enough for a machine that is busy. Whoever does not end by itself is still found out.)
    flags = ("--grace", "10", *flags)
    ended = cluster.start(text.format(rank=rank, fault=fault), *flags).wait()
    for number, end in enumerate(ended):
        assert end.code == code
        assert f"barepp: rank {rank} failed: {says}" in end.err
        assert end.err.count("Traceback") == (cause == "exception")
        (failed,) = (e for e in cluster.events(number) if e["event"] == "failed")
        assert (failed["rank"], failed["cause"], failed["primary"]) == (rank, cause, True)
    # Node 0 tells of every rank, the other one of its own.
    words = "was told while waiting (?:at a barrier|for a message from .*), and ended"
    told = [set(re.findall(rf"barepp: rank (\d) {words}", end.err)) for end in ended]
    assert told == [{"0", "1", "2"} - {str(rank)}, {"2"} - {str(rank)}], [e.err for e in ended]


# (torch's own optimizers import its compiler, which takes seconds. Ranks may share one pipe, so a
# line is written at once.)
TRAIN = """
    import barepp, os, torch
    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())
    torch.manual_seed(0)
    inputs, targets = torch.randn(24, 64), torch.randint(0, 10, (24,))
    for schedule in barepp.schedule_names():
        with barepp.init() as world:
            stages = 2 if schedule in ("interleaved_1f1b", "zb_v") else 1
            pipe = barepp.Pipeline(
                world, barepp.mlp(7, 32), torch.nn.functional.cross_entropy, schedule=schedule,
                num_microbatches=4, num_stages=stages * world.world_size, seed=3,
            )
            for step in range(2):
                pipe.zero_grad()
                pipe.step(inputs, targets)
                with torch.no_grad():
                    for parameter in pipe.parameters():
                        parameter -= 0.1 * parameter.grad
            digest = pipe.parameters_sha256()
            if world.rank == 0:
                say("sha256", digest)
            peers = getattr(world.transport, "_peers", {}).values()   # (one rank alone has none)
            kinds = {p.peer: p.socket.family.name for p in peers}
            say("family", world.rank, dict(sorted(kinds.items())))
"""


def the_digest(text: str) -> str:
    """Return what all schedules come to."""
    digests = re.findall(r"sha256 (\w{64})", text)
    assert len(digests) == 6 and len(set(digests)) == 1
    return str(digests[0])
