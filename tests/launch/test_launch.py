"""The command line, as a person types it: real processes, real signals, real sockets."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from jobs import (
    LIMIT_S,
    ROOT,
    Running,
    assert_nothing_left,
    launch,
    launching,
    run_job,
    temporary_files,
    write_script,
)
from transport_worlds import eventually

from barepp.launch.__main__ import main
from barepp.launch.processes.fork_server import REQUEST_FDS, ForkServer
from barepp.launch.processes.signals import signals_to

# -- a healthy run, looked at from every side -----------------------------------------------------

HEALTHY = """
import atexit, json, multiprocessing, os, signal, subprocess, sys, time
import barepp, torch
from torch.utils.data import DataLoader

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return index

def facts(world):
    batches = [batch.tolist() for batch in DataLoader(Rows(), batch_size=4, num_workers=1)]
    return {
        "rank": world.rank, "world_size": world.world_size, "argv": sys.argv,
        "path0": sys.path[0], "name": __name__, "file": __file__, "cwd": os.getcwd(),
        "stdin": sys.stdin.read(), "session": os.getsid(0) == os.getpid() == os.getpgrp(),
        "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "sigterm": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "start_method": multiprocessing.get_start_method(allow_none=True),
        "threads": torch.get_num_threads(), "batches": batches,
        "main": sys.modules["__main__"].facts is facts,
    }

if __name__ == "__main__":
    with barepp.init() as world:
        atexit.register(print, "exit handler of rank", world.rank)
        print(json.dumps(facts(world)))
        os.write(1, b"C level\\n")
        subprocess.run(["echo", "a child's output"], check=True)
        print("to stderr", file=sys.stderr)
        os.write(1, b"\\xff\\xfe binary\\n")
        world.barrier()
        if world.rank == 0: print("ready")
        while not os.path.exists(sys.argv[2]): time.sleep(0.01)   # the test looks around
        world.barrier()
        print("no newline at the end", end="")
"""


def test_a_healthy_run(tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = write_script(tmp_path, HEALTHY, "my script.py")
    arguments = ["--world", str(go), "--log-dir", "-x", "--", "y"]
    with launching(
        tmp_path, Path(script.name), "--world", "2", "--transport", "tcp", arguments=arguments
    ) as running:
        running.wait_for_line("[rank 0] ready")
        check_that_no_secret_shows(running)
        check_that_only_loopback_is_listened_on(running)
        check_that_the_launcher_has_no_torch(running)
        # All ranks have started: nothing of the job is on the disk any more, should it be killed.
        assert temporary_files(running) == []
        go.touch()
        job = running.finish()
        assert_nothing_left(running)
    assert (job.code, job.report) == (0, "")
    for rank in range(2):
        log = job.log(rank)
        facts = json.loads(log.splitlines()[0])
        assert facts == {
            "rank": rank,
            "world_size": 2,
            "argv": [script.name, *arguments],
            "path0": str(tmp_path),
            "name": "__main__",
            "file": script.name,
            "cwd": str(tmp_path),
            "stdin": "",
            "session": True,
            "sigint": True,
            "sigterm": True,
            "start_method": multiprocessing.get_all_start_methods()[0],  # the platform's own
            "threads": 1,
            "batches": [[0, 1, 2, 3], [4, 5, 6, 7]],
            "main": True,
        }
        for line in ("C level", "a child's output", "to stderr", "\ufffd\ufffd binary"):
            assert line in log.splitlines()
        assert "no newline at the end" in log and f"exit handler of rank {rank}" in log
    assert sorted(job.err.splitlines()) == ["[rank 0] to stderr", "[rank 1] to stderr"]
    assert all(re.match(r"\[rank [01]\] ", line) for line in job.out.splitlines())
    events = job.events
    assert [event["event"] for event in events] == ["started"] * 2 + ["ended"] * 2
    assert {event["rank"] for event in events if event["event"] == "started"} == {0, 1}
    assert all(isinstance(event["pid"], int) for event in events if event["event"] == "started")
    assert all(event["exit_code"] == 0 for event in events if event["event"] == "ended")
    assert all(abs(event["time"] - time.time()) < 300 for event in events)


def check_that_no_secret_shows(running: Running) -> None:
    """The job's secret is 32 random bytes: in no argument and no environment, however written."""
    processes = running.processes()
    assert len(processes) >= 4  # launcher, fork server, ranks
    for process in processes:
        for text in (*process.cmdline(), *process.environ().values()):
            if running.mark not in text:
                assert not re.search(r"\b[0-9a-fA-F]{64}\b", text), text
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert all(entry.isascii() for entry in environment.split(b"\0"))
    names = [set(process.environ()) for process in processes]
    ours = set(os.environ) | {"BAREPP_TEST_MARK", "BAREPP_PARENT_PID"}
    assert all(not any("BAREPP" in name for name in found - ours) for found in names)


def check_that_only_loopback_is_listened_on(running: Running) -> None:
    listening = [
        connection
        for process in running.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 3  # the rendezvous, and one a rank
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


def check_that_the_launcher_has_no_torch(running: Running) -> None:
    maps = Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "libtorch" not in maps and "msgpack" in maps


# -- failures -------------------------------------------------------------------------------------

KILLED = """
    import barepp, os, sys, torch
    with barepp.init() as world:
        world.barrier()
        if world.rank == 2:
            for number in range(20_000): print("last words", number)
            sys.stdout.flush()
            os.kill(os.getpid(), 9)
        try:
            world.recv(2)
        except barepp.JobFailed as error:
            print("told", error.failure.message)
            raise
"""


def test_a_killed_rank_is_named_once_after_its_last_words(tmp_path: Path) -> None:
    job = launch(tmp_path, KILLED, "--world", "3")
    assert job.code == 137
    said = job.said(2)
    assert said == [f"last words {number}" for number in range(20_000)]
    assert job.said(0) == job.said(1) == ["told it was killed by SIGKILL"]
    assert job.err.splitlines() == [
        "barepp: rank 2 failed: it was killed by SIGKILL",
        "barepp: rank 0 was told while waiting for a message from rank 2 with tag 0, and ended",
        "barepp: rank 1 was told while waiting for a message from rank 2 with tag 0, and ended",
    ]


def test_the_report_comes_after_what_was_printed_on_one_terminal(tmp_path: Path) -> None:
    script = """
        import barepp, sys
        with barepp.init() as world:
            print("printed before")
            world.barrier()
            raise SystemExit(3)
    """
    job = launch(tmp_path, script, "--world", "2", stderr=subprocess.STDOUT)
    lines = job.out.splitlines()
    assert job.code == 3
    assert sorted(lines[:2]) == ["[rank 0] printed before", "[rank 1] printed before"]
    assert re.match(r"barepp: ranks? [01-]+ failed.*: it called sys.exit\(3\)", lines[2])


WAITING = """
    import barepp, time
    with barepp.init() as world:
        world.barrier()
        print("ready", flush=True)
        if world.rank == 2: time.sleep(1000)   # does not listen
        world.recv(1 - world.rank)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_launcher_ends_everything(name: str, tmp_path: Path) -> None:
    number = signal.Signals[name]
    with launching(tmp_path, WAITING, "--world", "3") as running:
        running.wait_for_line("ready", 3)
        began = time.monotonic()
        running.process.send_signal(number)
        job = running.finish()
        assert time.monotonic() - began < 3.0
        assert_nothing_left(running)
    assert job.code == 128 + number
    first, *told, last = job.err.splitlines()
    assert first == f"barepp: the job failed: the launcher received {name}"
    for rank, line in enumerate(told):  # each was told in the barrier still, or behind it
        where = f"(waiting at a barrier|waiting for a message from rank {1 - rank} with tag 0)"
        assert re.fullmatch(f"barepp: rank {rank} was told while {where}, and ended", line)
    assert len(told) == 2
    assert (
        last == "barepp: rank 2 was told while in the script's own code, did not end by itself "
        "and was killed"
    )
    assert (job.failed["rank"], job.failed["cause"], job.failed["signal"]) == (-1, "signal", number)
    assert sum(event["event"] == "ended" for event in job.events) == 3


def test_ctrl_c_in_a_terminal_ends_everything_while_the_ranks_start(tmp_path: Path) -> None:
    """The signal reaches the whole group; the fork server is in the midst of importing torch."""
    with launching(tmp_path, WAITING, "--world", "3") as running:
        wait_for_processes(running, 2)
        began = time.monotonic()
        os.killpg(running.process.pid, signal.SIGINT)
        job = running.finish()
        assert time.monotonic() - began < 1.0
        assert_nothing_left(running)
    assert job.code == 130
    assert job.err == "barepp: the job failed: the launcher received SIGINT\n"


def test_a_second_ctrl_c_waits_for_nobody(tmp_path: Path) -> None:
    with launching(tmp_path, WAITING, "--world", "3", "--grace", "60") as running:
        running.wait_for_line("ready", 3)
        began = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        while not (tmp_path / "log" / "events.jsonl").read_text().count('"failed"'):
            time.sleep(0.01)
        running.process.send_signal(signal.SIGINT)
        job = running.finish()
        assert time.monotonic() - began < 3.0
    assert job.code == 130
    assert (
        "rank 2 was told while in the script's own code, did not end by itself and was killed"
        in job.err
    )


def wait_for_processes(running: Running, count: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(running.processes()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    with launching(tmp_path, WAITING, "--world", "3") as running:
        running.wait_for_line("ready", 3)
        stopped = [p for p in running.processes() if p.pid != running.process.pid][-1]
        stopped.suspend()  # a stopped one neither
        running.process.kill()
        running.process.wait(10)
        assert_nothing_left(running, within_s=2.0)


def test_a_fork_server_that_is_still_importing_does_not_outlive_the_launcher(
    tmp_path: Path,
) -> None:
    with launching(tmp_path, WAITING, "--world", "3") as running:
        wait_for_processes(running, 2)
        running.process.kill()
        running.process.wait(10)
        eventually(lambda: not running.processes())  # (what Python's own start takes, under load)


def test_a_killed_fork_server_is_named(tmp_path: Path) -> None:
    with launching(tmp_path, WAITING, "--world", "3") as running:
        running.wait_for_line("ready", 3)
        rank_pids = {event["pid"] for event in read_events(tmp_path)}
        (server,) = {psutil.Process(pid).ppid() for pid in rank_pids}
        os.kill(server, signal.SIGKILL)
        job = running.finish()
        assert_nothing_left(running)
    assert job.code == 1
    first = job.err.splitlines()[0]
    assert first == "barepp: the job failed: the process that all ranks were started from has died"


def read_events(folder: Path) -> list[dict[str, int]]:
    lines = (folder / "log" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_terminal_that_nobody_reads_holds_up_nothing(tmp_path: Path) -> None:
    script = """
        import barepp, os, time
        with barepp.init() as world:
            world.barrier()
            if world.rank == 0:
                while True: print("x" * 1000)   # until the terminal is full, and beyond
            time.sleep(0.3)
            os._exit(7)
    """
    with launching(tmp_path, script, "--world", "2") as running:
        assert running.process.wait(LIMIT_S) == 7  # without anybody reading stdout or stderr
        assert_nothing_left(running)


# -- wrong usage ----------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else -1
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    return err


@pytest.fixture
def script(tmp_path: Path) -> str:
    return str(write_script(tmp_path, "print('hello')"))


@pytest.mark.parametrize("world", ["0", "-3", "1025"])
def test_a_world_that_cannot_be(
    world: str, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, "--world", world, script)
    assert text == f"barepp.launch: --world is the number of ranks, 1 to 1024, not {world}\n"


def test_a_world_that_is_no_number(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid int value: 'x'" in refused(capsys, "--world", "x", script)
    assert "required: --world" in refused(capsys, script)
    assert "required: script" in refused(capsys, "--world", "2")


def test_an_unknown_transport_lists_those_that_exist(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, "--world", "2", "--transport", "pigeon", script)
    assert "there is no transport 'pigeon'" in text
    assert "auto, cuda_ipc, gloo, inproc, nccl, shm, tcp, unix" in text


def test_inproc_is_not_for_processes(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "--world", "2", "--transport", "inproc", script)
    assert "the launcher starts processes" in text


@pytest.mark.parametrize("flag", ["--grace", "--join-timeout"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e300"])
def test_seconds_that_cannot_be(
    flag: str, value: str, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, "--world", "2", f"{flag}={value}", script)
    assert f"{flag} is in seconds" in text


def test_scripts_that_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(path: Path) -> str:
        return refused(capsys, "--world", "2", str(path))

    assert "does not exist" in refusal(tmp_path / "missing.py")
    assert "is a directory" in refusal(tmp_path)
    broken = write_script(tmp_path, "x = 1\nif x\n")
    assert "is not valid Python" in refusal(broken) and "line 2" in refusal(broken)
    binary = tmp_path / "binary.py"
    binary.write_bytes(b"\x00\xff\xfe")
    assert "is not valid Python" in refusal(binary)
    if os.geteuid() != 0:
        broken.chmod(0)
        assert "cannot be read" in refusal(broken)


def test_a_log_dir_that_cannot_be_made(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, "--world", "2", "--log-dir", f"{script}/log", script)
    assert "cannot be made: Not a directory" in text
    (tmp_path / "log" / "events.jsonl").mkdir(parents=True)
    text = refused(capsys, "--world", "2", "--log-dir", str(tmp_path / "log"), script)
    assert "the events cannot be written" in text


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--world", "--transport", "--log-dir", "--grace", "--join-timeout"):
        assert flag in text


def test_more_ranks_than_the_machine_can_hold_is_a_sentence(tmp_path: Path) -> None:
    """Every rank costs the launcher a handful of descriptors."""
    script = write_script(tmp_path, "print('hello')")
    limited = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (40, 40)); "
    command = (
        "from barepp.launch.__main__ import main; "
        "raise SystemExit(main(['--world', '40', 'script.py']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", limited + command],
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "cannot be started: Too many open files; a smaller world may work" in ended.stderr
    assert "Traceback" not in ended.stderr


SHORT_OF_DESCRIPTORS = """
import errno, os, resource
from barepp.launch.processes.fork_server import REQUEST_FDS, ForkServer, ForkServer

fork_server = ForkServer(fork=False)
server = fork_server.parent_pid
usual = resource.getrlimit(resource.RLIMIT_NOFILE)
for limit in range(3, 3 * REQUEST_FDS + max(map(int, os.listdir("/proc/self/fd")))):
    process = fork_server.context.Process(target=print, args=(f"limit {limit}",))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, usual[1]))
    try:
        fork_server.start(process)
    except OSError as error:
        assert error.errno == errno.EMFILE, error
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    if process.pid is not None:
        process.join()
assert process.exitcode == 0, process
assert fork_server.parent_pid == server, "the fork server is another one"
fork_server.end()
"""


def test_a_lack_of_descriptors_never_reaches_the_fork_server() -> None:
    """Whichever descriptor of a request is one too many: the server lives, and is silent."""
    ended = subprocess.run(
        [sys.executable, "-c", SHORT_OF_DESCRIPTORS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout.count("limit") >= REQUEST_FDS


# -- signals, by themselves -----------------------------------------------------------------------


def test_signals_are_told_and_given_back() -> None:
    told: list[int] = []
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with signals_to(told.append):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
    assert told == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_temporary_folder_with_a_long_name_holds_the_fork_servers_socket(tmp_path: Path) -> None:
    """The path of a Unix socket has at most 107 bytes."""
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir()
    script = "import barepp\nwith barepp.init() as world: print('here')"
    with launching(tmp_path, script, "--world", "2", env={"TMPDIR": str(temporary)}) as running:
        ended = running.finish()
        assert_nothing_left(running)
    assert ended.code == 0, ended.err
    assert ended.said(0) == ended.said(1) == ["here"]
    assert list(temporary.iterdir()) == []


def test_a_fork_server_that_cannot_start_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(server: ForkServer) -> None:
        raise OSError("no process is left")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("multiprocessing.forkserver.ForkServer.ensure_running", fail)
    multiprocessing.resource_tracker.ensure_running()  # it stays
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no process is left"):
        ForkServer(fork=False)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_sigquit_is_taken_only_by_who_asks_for_it() -> None:
    before = signal.getsignal(signal.SIGQUIT)
    told: list[int] = []
    with signals_to(told.append):
        assert signal.getsignal(signal.SIGQUIT) is before
    with signals_to(told.append, signal.SIGQUIT):
        signal.raise_signal(signal.SIGQUIT)
    assert told == [signal.SIGQUIT] and signal.getsignal(signal.SIGQUIT) is before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        told: list[int] = []
        with signals_to(told.append):
            signal.raise_signal(signal.SIGHUP)
        assert told == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_checksum_reaches_every_ranks_transport(tmp_path):
    script = """
        import barepp, torch
        with barepp.init() as world:
            if world.rank == 0:
                world.send(torch.arange(100_000), 1)
            else:
                assert int(world.recv(0).sum()) == 4999950000
            print("sums", world.transport.checksum)
    """
    finished = launch(tmp_path, script, "--world", "2", "--checksum")
    assert finished.code == 0, finished.err
    assert [finished.said(rank) for rank in (0, 1)] == [["sums True"]] * 2


BROKE = "its control connection to the launcher broke, and no rank goes on without that"


@pytest.mark.parametrize(
    ("then", "doing"),
    [
        ("world.recv(0)", " while waiting for a message from rank 0 with tag 0"),
        ("world.barrier()", " while waiting at a barrier"),
        ("time.sleep(60)", ""),
    ],
)
def test_a_rank_that_alone_loses_the_launcher_says_why_it_ends(
    then: str, doing: str, tmp_path: Path
) -> None:
    """The launcher sees an exit code; what it means, only the rank knows."""
    text = """
        import barepp, socket, time
        from barepp.worker.process_state import process
        with barepp.init() as world:
            world.barrier()
            if world.rank == 1:
                process.control._stream.socket.shutdown(socket.SHUT_RDWR)
                THEN
            world.recv(1)
    """
    job = run_job(tmp_path, text.replace("THEN", then))
    assert (job.code, job.failed["cause"]) == (1, "lost")
    assert f"barepp: rank 1 failed{doing}: {BROKE}\n" in job.err
    assert re.search("barepp: rank 0 (was told|failed as well)", job.err)  # (it lost rank 1)
