"""Ranks that torchrun or Slurm's srun has started: for real, and with their environment simulated.

Rank 0's helper serves the rendezvous and decides what the first failure is, as our own launcher
would; nobody sees how a process ends, so a rank that is gone without a word is "lost".
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from jobs import MARK, listening_at, marked, write_script
from ports import free_port
from starter import Ended, Started, Starter, eventually

GONE_S = 5.0  # what is told at once, on a machine that is loaded


def torchruns(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port - 1),
        "TORCHELASTIC_RUN_ID": "none",
    }


def slurms(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(world_size),
        "SLURM_LOCALID": str(rank),
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": socket.gethostname(),
        "BAREPP_PORT": str(port),
    }


class Crew:
    """Ranks that were started one by one; rank 0 last, as it may happen."""

    def __init__(
        self,
        starter: Starter,
        folder: Path,
        text: str,
        world_size: int,
        *,
        extra: Mapping[str, str],
        says: object = torchruns,
    ) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.mark = f"{folder}"
        script = write_script(folder, text)
        port = free_port()
        self.ranks: dict[int, Started] = {}
        for rank in reversed(range(world_size)):
            environ = {**says(rank, world_size, port), **extra}  # type: ignore[operator]
            environ |= {"TMPDIR": str(self.temporary), MARK: self.mark}
            self.ranks[rank] = starter.start(script, environ)

    def wait(self) -> dict[int, Ended]:
        """Wait for all ranks; nothing of the job is left then."""
        ended = {rank: started.wait() for rank, started in self.ranks.items()}
        eventually(lambda: not marked(self.mark))
        assert list(self.temporary.iterdir()) == []
        return ended

    def helper(self) -> psutil.Process:
        (found,) = [
            p for p in marked(self.mark) if "barepp.launch.hosts.rendezvous_process" in p.cmdline()
        ]
        return found


@contextlib.contextmanager
def crew(
    starter: Starter, folder: Path, text: str, world_size: int, **options: object
) -> Iterator[Crew]:
    made = Crew(starter, folder, text, world_size, **{"extra": {}, **options})  # type: ignore[arg-type]
    try:
        yield made
    finally:
        for started in made.ranks.values():
            started.kill()
        for left in marked(made.mark):  # the helper
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


HEALTHY = """
    import barepp, os, torch
    for _ in range(2):       # worlds come one after the other
        with barepp.init() as world:
            pipe = barepp.Pipeline(
                world, barepp.mlp(4, 8, 8, 3), torch.nn.functional.cross_entropy,
                schedule="1f1b", num_microbatches=4, seed=1,
            )
            loss = pipe.step(torch.ones(8, 8), torch.zeros(8, dtype=torch.int64))
            assert world.local_rank == world.rank
            words = f"{world.rank} {world.world_size} {world.transport.name} {loss.item()}\\n"
            os.write(1, words.encode())   # (torchrun's ranks share one pipe: a line at once)
"""


@pytest.mark.parametrize("says", [torchruns, slurms])
def test_a_healthy_run(says: object, starter: Starter, tmp_path: Path) -> None:
    extra = {"BAREPP_TRANSPORT": "unix"} if says is slurms else {}
    with crew(starter, tmp_path, HEALTHY, 3, says=says, extra=extra) as job:
        ended = job.wait()
    name = "unix" if says is slurms else "shm"
    losses = set()
    for rank, end in ended.items():
        assert (end.code, end.err) == (0, "")
        assert len(end.out.splitlines()) == 2
        for line in end.out.splitlines():
            assert line.startswith(f"{rank} 3 {name} ")
            losses.add(line.split()[-1])
    assert len(losses) == 1


def test_the_helper_is_of_the_same_barepp_wherever_the_job_is_started(
    starter: Starter, tmp_path: Path
) -> None:
    (tmp_path / "barepp").mkdir()
    (tmp_path / "barepp" / "__init__.py").write_text("raise SystemExit('another barepp')")
    text = f"""
        import barepp, os
        os.chdir({str(tmp_path)!r})
        with barepp.init() as world:
            world.barrier()
    """
    with crew(starter, tmp_path, text, 2, extra={"BAREPP_JOIN_TIMEOUT": "5"}) as job:
        assert [(end.code, end.err) for end in job.wait().values()] == [(0, "")] * 2


def test_the_secret_is_given_until_all_have_come_and_no_file_is_made(
    starter: Starter, tmp_path: Path
) -> None:
    text = """
        import barepp, os, pathlib, time
        from barepp.worker.external import adopt, environment, secret
        name = secret._name(adopt._run(environment.started_by_others(os.environ)))[1:]
        def is_there():
            return name in pathlib.Path("/proc/net/unix").read_text()
        before = is_there()
        with barepp.init() as world:
            until = time.monotonic() + 20
            while is_there() and time.monotonic() < until:
                time.sleep(0.01)
            print(before and world.rank == 0, is_there(), os.listdir(os.environ["TMPDIR"]))
    """
    for extra in ({}, {"BAREPP_SECRET": "a secret of sixteen characters"}):
        folder = tmp_path / str(len(extra))
        folder.mkdir()
        with crew(starter, folder, text, 2, extra=extra) as job:
            assert [(end.code, end.out) for end in job.wait().values()] == [
                (0, "False False []\n")
            ] * 2


# -- failures -------------------------------------------------------------------------------------

SURVIVE = """
    import barepp, os, signal, sys, threading, time
    with barepp.init() as world:
        try:
            world.barrier()
            if world.rank == {rank}:
                {fault}
            world.recv({rank}, tag=7)
        except barepp.JobFailed as error:
            os.write(1, f"cause {{error.failure.cause}} by {{error.failure.rank}}\\n".encode())
            print(error)
            raise
"""

FAULTS = {
    # fault: (its exit code, cause, what every other rank is told)
    "raise ValueError('boom')": (1, "exception", "ValueError: boom"),
    "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)": (
        1,
        "exception",
        "ZeroDivisionError: division by zero",
    ),
    "sys.exit(3)": (3, "exit", "it called sys.exit(3)"),
    "os._exit(0)": (0, "lost", "it is gone: its control connection ended without a goodbye"),
    "os.kill(os.getpid(), signal.SIGKILL)": (
        -9,
        "lost",
        "it is gone: its control connection ended without a goodbye",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_cause_told_to_everyone(fault: str, starter: Starter, tmp_path: Path) -> None:
    code, cause, message = FAULTS[fault]
    with crew(starter, tmp_path, SURVIVE.format(rank=1, fault=fault), 3) as job:
        ended = job.wait()
    assert ended[1].code == code
    assert (message in ended[1].err) == (cause == "exception")  # its own traceback, once
    assert ended[1].err.count("Traceback (most") == (cause == "exception")
    for rank in (0, 2):
        assert ended[rank].code == 1
        assert f"cause {cause} by 1\n" in ended[rank].out
        assert message in ended[rank].out
        told = f"barepp: rank {rank} was told while waiting "
        first, *rest = ended[rank].err.splitlines()
        assert first.startswith((f"{told}at a barrier", f"{told}for a message from rank 1"))
        assert ": rank 1 failed" in first and message in first
        # The failing rank's traceback, and that of nobody else: once on rank 0, for whoever reads.
        shown = rank == 0 and cause == "exception"
        assert ("\n".join(rest).count("Traceback (most"), len(rest) > 0) == (shown, shown)
        assert ended[rank].out.count("Traceback (most") == (cause == "exception")


def test_the_death_of_rank_0_is_told_by_what_it_leaves(starter: Starter, tmp_path: Path) -> None:
    text = SURVIVE.format(rank=0, fault="os.kill(os.getpid(), signal.SIGKILL)")
    with crew(starter, tmp_path, text, 3) as job:
        ended = job.wait()
    for rank in (1, 2):
        assert ended[rank].code == 1
        assert "cause lost by 0\n" in ended[rank].out
        assert "rank 0, which served the rendezvous, is gone" in ended[rank].err


def test_who_comes_after_the_death_of_rank_0_is_told(starter: Starter, tmp_path: Path) -> None:
    text = """
        import barepp, os, time
        if os.environ["RANK"] == "0":
            from barepp.worker import init as joining
            joining.transport_class = lambda *_, **__: os._exit(5)  # (in, and not joined)
        else:
            while not os.path.exists("late"):
                time.sleep(0.01)
        barepp.init()
    """
    text = text.replace('"late"', repr(str(tmp_path / "late")))
    extra = {"BAREPP_SECRET": "a secret of sixteen characters", "BAREPP_JOIN_TIMEOUT": "5"}
    with crew(starter, tmp_path, text, 2, extra=extra) as job:
        assert job.ranks[0].wait().code == 5
        (tmp_path / "late").touch()
        ended = job.wait()
    assert ended[1].code == 1
    assert "rank 0 failed: rank 0, which served the rendezvous, is gone" in ended[1].err


def test_who_comes_after_the_death_of_rank_0_does_not_wait_for_its_secret(
    starter: Starter, tmp_path: Path
) -> None:
    text = """
        import barepp, os, pathlib, signal, time
        pid, late = pathlib.Path("FOLDER/pid"), pathlib.Path("FOLDER/late")
        if os.environ["RANK"] == "0":
            from barepp.worker import init as joining
            def stay(*_, **__):   # (it is in, and has not joined)
                pid.write_text(str(os.getpid()))
                time.sleep(60)
            joining.transport_class = stay
        else:
            while not late.exists():
                time.sleep(0.01)
            os.kill(int(pid.read_text()), signal.SIGKILL)   # the helper stays for 2 s from now on
            while ") Z " not in pathlib.Path("/proc", pid.read_text(), "stat").read_text():
                time.sleep(0.001)
        barepp.init()
    """
    text = text.replace("FOLDER", str(tmp_path))
    with crew(starter, tmp_path, text, 2, extra={"BAREPP_JOIN_TIMEOUT": "1000"}) as job:
        eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        (tmp_path / "late").touch()
        end = job.wait()[1]
    assert end.code == 1
    assert "rank 0 failed: rank 0, which served the rendezvous, is gone" in end.err


def test_the_death_of_rank_0_and_of_its_helper(starter: Starter, tmp_path: Path) -> None:
    text = SURVIVE.format(rank=0, fault="print('here', flush=True); time.sleep(60)")
    with crew(starter, tmp_path, text, 3) as job:
        eventually(lambda: "here" in job.ranks[0].out)
        helper = job.helper()
        pids = [helper.pid, *(started.pid for started in job.ranks.values())]
        assert listening_at(pids) == {"127.0.0.1"}
        began = time.monotonic()
        job.ranks[0].kill(signal.SIGSTOP)  # so that the end of the helper is the first news
        helper.kill()
        for rank in (1, 2):
            end = job.ranks[rank].wait()
            assert end.code == 1
            assert "rank 0, which served the rendezvous, is gone" in end.err
        assert time.monotonic() - began < GONE_S
        job.ranks[0].kill()
        assert job.ranks[0].wait().code == -9


def test_rank_0_that_is_stopped_is_found_by_its_helper(starter: Starter, tmp_path: Path) -> None:
    text = SURVIVE.format(rank=0, fault="os.kill(os.getpid(), signal.SIGSTOP)")
    with crew(starter, tmp_path, text, 2, extra={"BAREPP_HEARTBEAT": "2"}) as job:
        end = job.ranks[1].wait()
        assert end.code == 1
        assert "rank 0 failed: no sign of life for 2 s" in end.err
        job.ranks[0].kill()
        job.wait()


def test_a_deadlock_is_proven_and_shown(starter: Starter, tmp_path: Path) -> None:
    text = """
        import barepp
        def stuck(world):
            world.recv(1 - world.rank)
        with barepp.init() as world:
            stuck(world)
    """
    with crew(starter, tmp_path, text, 2) as job:
        ended = job.wait()
    for rank, end in ended.items():
        assert end.code == 1
        assert "a deadlock: every rank waits, and no message is on its way" in end.err
        assert f"barepp: the Python stack of rank {rank}:" in end.err
        assert "world.recv(1 - world.rank)" in end.err


def test_who_is_told_and_does_not_end_is_ended(starter: Starter, tmp_path: Path) -> None:
    text = """
        import barepp, os, time
        world = barepp.init()
        world.barrier()
        if world.rank == 1:
            os._exit(5)
        while True:
            time.sleep(0.05)
    """
    with crew(starter, tmp_path, text, 2, extra={"BAREPP_GRACE": "0.2"}) as job:
        ended = job.wait()
    assert (ended[0].code, ended[1].code) == (1, 5)
    words = "while in the script's own code, and did not end within 0.2 s: rank 1 failed: it is"
    assert words in ended[0].err


def test_who_is_told_in_the_midst_of_init_is_ended_as_well(
    starter: Starter, tmp_path: Path
) -> None:
    text = """
        import barepp, os, time
        from barepp.worker import init as joining
        usual = joining._beat
        def slowly(control, world):   # (all have joined, and the world is not made yet)
            if control.rank == 1:
                os._exit(5)
            control.on_failure(lambda failure: told.append(failure))
            while not told:
                time.sleep(0.01)
            usual(control, world)
        told = []
        joining._beat = slowly
        world = barepp.init()
        while True:
            time.sleep(0.05)
    """
    with crew(starter, tmp_path, text, 2, extra={"BAREPP_GRACE": "0.2"}) as job:
        ended = job.wait()
    assert (ended[0].code, ended[1].code) == (1, 5)
    assert "and did not end within 0.2 s: rank 1 failed: it is gone" in ended[0].err


def test_a_world_left_open_is_left_at_the_end(starter: Starter, tmp_path: Path) -> None:
    text = """
        import atexit, barepp
        world = barepp.init()
        atexit.register(print, "handler")
    """
    with crew(starter, tmp_path, text, 2) as job:
        ended = job.wait()
    assert [(end.code, end.out, end.err) for end in ended.values()] == [(0, "handler\n", "")] * 2


def test_a_return_while_the_others_wait_is_a_failure(starter: Starter, tmp_path: Path) -> None:
    text = """
        import barepp
        world = barepp.init()
        if world.rank == 0:
            world.recv(1)
    """
    with crew(starter, tmp_path, text, 2) as job:
        ended = job.wait()
    for end in ended.values():
        assert end.code == 1
        assert "rank 0 waits for rank 1: waiting for a message from rank 1" in end.err
        assert "rank 1 waits for all ranks: leaving the world" in end.err


def test_a_rank_that_never_comes_is_named(starter: Starter, tmp_path: Path) -> None:
    text = """
        import barepp, os
        if os.environ["RANK"] == "2":
            raise SystemExit
        barepp.init()
    """
    with crew(starter, tmp_path, text, 3, extra={"BAREPP_JOIN_TIMEOUT": "1"}) as job:
        ended = job.wait()
    for rank in (0, 1):
        assert ended[rank].code == 1
        assert "2 of 3 ranks joined within 1 s; missing: rank 2" in ended[rank].err


def test_rank_0_that_never_comes_is_named(starter: Starter, tmp_path: Path) -> None:
    text = """
        import barepp, os
        if os.environ["RANK"] == "0":
            raise SystemExit
        barepp.init()
    """
    given = {"BAREPP_JOIN_TIMEOUT": "0.5"}
    with crew(starter, tmp_path, text, 2, extra=given) as job:
        assert "rank 0 has not given the secret of run" in job.wait()[1].err
    (tmp_path / "tmp").rename(tmp_path / "before")
    given["BAREPP_SECRET"] = "a secret of sixteen characters"
    with crew(starter, tmp_path, text, 2, extra=given) as job:
        assert "cannot be reached: Connection refused" in job.wait()[1].err


@pytest.mark.parametrize(("name", "home"), [("barepp", "barepp.cli"), ("torch", "torch")])
def test_other_software_on_a_rank_is_refused(
    name: str, home: str, starter: Starter, tmp_path: Path
) -> None:
    text = f"""
        import barepp, os, {home}
        if os.environ["RANK"] == "1":
            {home}.__version__ = "0.0.7"
        barepp.init()
    """
    with crew(starter, tmp_path, text, 2) as job:
        ended = job.wait()
    for end in ended.values():
        assert end.code == 1
        assert re.search(f"{name} 0\\.0\\.7.* but rank|but rank . runs {name} 0\\.0\\.7", end.err)
        assert "all must run the same" in end.err


# -- what is refused ------------------------------------------------------------------------------


def refused(starter: Starter, tmp_path: Path, environ: Mapping[str, str]) -> str:
    script = write_script(tmp_path, "import barepp; barepp.init()")
    given = {**environ, "TMPDIR": str(tmp_path), "BAREPP_JOIN_TIMEOUT": "5"}
    end = starter.start(script, given).wait()
    assert end.code == 1
    return end.err.splitlines()[-1]


def test_several_hosts_without_a_secret_are_refused(starter: Starter, tmp_path: Path) -> None:
    for rank in range(2):
        environ = {**torchruns(rank, 2, free_port()), "LOCAL_WORLD_SIZE": "1"}
        last = refused(starter, tmp_path, environ)
        assert "UsageError: ranks on several hosts need a secret that they share: set" in last


def test_a_port_that_is_taken_is_refused_with_the_remedy(starter: Starter, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        last = refused(starter, tmp_path, torchruns(0, 2, taken.getsockname()[1]))
    assert "RendezvousError: the rendezvous cannot be served at 127.0.0.1:" in last
    assert "Address already in use; another port may be free (BAREPP_PORT, set for all" in last
    assert not list(tmp_path.glob("barepp-*/*"))


def test_another_job_at_the_port_is_noticed(starter: Starter, tmp_path: Path) -> None:
    text = "import barepp, time\nwith barepp.init() as world: time.sleep(60)"
    with crew(starter, tmp_path, text, 2, extra={"BAREPP_SECRET": "0123456789abcdef"}) as job:
        eventually(
            lambda: any(
                "barepp.launch.hosts.rendezvous_process" in p.cmdline() for p in marked(job.mark)
            )
        )
        connections = job.helper().net_connections()
        port = next(c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN)
        environ = {**torchruns(1, 2, port), "BAREPP_SECRET": "fedcba9876543210"}
        last = refused(starter, tmp_path, environ)
        assert "keeps hanging up: does it serve another job?" in last
