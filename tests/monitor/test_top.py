"""`barepp.top` and `launch --watch` on real jobs: what they show is what the scripts really did."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from subprocess import PIPE

import pytest
from jobs import ROOT, Watched, assert_nothing_left, launching, watched_job
from terminal import Terminal
from transport_worlds import eventually

import barepp
from barepp.monitor.client import line_to, socket_names
from barepp.monitor.rates import Rates
from barepp.monitor.status import RankStatus
from barepp.top import main

TRAIN_AND_WAIT = """
    import os, time
    import torch, barepp

    with barepp.init() as world:
        if world.rank == 0:
            for _ in range(10):
                world.send(torch.ones(1000), 1)
        else:
            for _ in range(10):
                world.recv(0)
        world.barrier()
        print("bytes", world.transport.traffic.sent_nbytes, world.transport.traffic.received_nbytes)
        world.barrier()  # (what comes next is not to be counted yet)
        pipe = barepp.Pipeline(
            world, barepp.mlp(4, 8), torch.nn.functional.cross_entropy, num_microbatches=4
        )
        for _ in range(3):
            pipe.step(torch.ones(16, 64), torch.zeros(16, dtype=torch.int64))
        traffic = world.transport.traffic
        print("bytes", traffic.sent_nbytes, traffic.received_nbytes)
        while not os.path.exists("{go}"):
            time.sleep(0.01)
        pipe.forward(torch.ones(16, 64))
        print("microbatches", world.microbatches)
"""


def columns_of(text: str) -> list[dict[str, str]]:
    """Read the table that a person sees."""
    header, *rows = text.splitlines()[1:]
    ends = [(match[0], match.end()) for match in re.finditer(r"\S+", header)]
    found = []
    for row in filter(None, rows):
        cells, start = {}, 0
        for position, (name, end) in enumerate(ends):
            if name == "state":  # the one that stands at the left of its column
                end = ends[position + 1][1] - 6
            cells[name] = row[start:end].strip()
            start = end
        found.append(cells)
    return found


def settled(job: Watched, ranks: int = 2) -> list[RankStatus]:
    """Wait until all have told that they have done their three steps."""
    eventually(lambda: [rank.steps for rank in job.line.status()[1]] == [3] * ranks)
    return job.line.status()[1]


def test_the_picture_shows_what_the_script_did(tmp_path, capsys):
    go = tmp_path / "go"
    with watched_job(tmp_path, TRAIN_AND_WAIT.replace("{go}", str(go))) as job:
        statuses = settled(job)
        told, _ = job.line.status()
        assert (told.pid, told.world_size) == (os.getpid(), 2)
        assert told.task == str(tmp_path / "script.py")
        began = time.monotonic()
        assert main(["--once", "--interval", "1", str(os.getpid())]) == 0
        assert time.monotonic() - began >= 1  # the rates' interval
        shown = capsys.readouterr().out
        assert main(["--once", "--json", "--interval", "0.6", str(os.getpid())]) == 0
        found = json.loads(capsys.readouterr().out)
        go.touch()
    finished = job.finish()
    assert finished.code == 0, finished.report
    assert str(tmp_path / "script.py") in shown.splitlines()[0]
    for status, row, facts in zip(statuses, columns_of(shown), found["ranks"], strict=True):
        first, last, microbatches = finished.said(status.rank)
        own, other = (40_000, 0) if status.rank == 0 else (0, 40_000)
        assert first == f"bytes {own} {other}"
        assert last == f"bytes {status.sent_nbytes} {status.received_nbytes}"
        assert status.sent_nbytes > own and status.received_nbytes > other
        assert status.microbatches == pytest.approx(12)
        assert float(microbatches.split()[1]) == pytest.approx(16)  # a forward's pass it as well
        assert row["state"] == facts["state"] == "in the script's own code"
        assert row["steps"] == "3" and facts["steps"] == 3
        assert (row["pid"], facts["pid"]) == (str(status.pid), status.pid)
        assert row["micro/s"] == "0.0" and row["in/s"] == row["out/s"] == "0 B"
        assert row["in"].endswith("KiB") and row["out"].endswith("KiB")
        assert row["memory"].endswith(("MiB", "GiB")) and facts["rss_nbytes"] > 2**20
        assert 0 <= facts["cpu_percent"] < 100
    assert statuses[0].sent_nbytes == statuses[1].received_nbytes
    assert statuses[1].sent_nbytes == statuses[0].received_nbytes


def test_rates_of_a_job_that_moves(tmp_path):
    script = """
        import torch, barepp
        with barepp.init() as world:
            pipe = barepp.Pipeline(
                world, barepp.mlp(4, 8), torch.nn.functional.cross_entropy, num_microbatches=4
            )
            go = torch.zeros(1)
            while not go.item():
                pipe.step(torch.ones(16, 64), torch.zeros(16, dtype=torch.int64))
                if world.rank == 0:
                    import os
                    go.fill_(os.path.exists("{go}"))
                    world.send(go, 1)
                else:
                    go = world.recv(0)
    """
    go = tmp_path / "go"
    with watched_job(tmp_path, script.replace("{go}", str(go))) as job:
        readings = Rates(local=True)
        taken = []

        def moves() -> bool:
            taken[:] = readings.take(job.line.status()[1])
            return len(taken) == 2 and all(reading.microbatches_per_s for reading in taken)

        eventually(moves)
        go.touch()
    assert job.finish().code == 0
    for reading in taken:
        steps_per_s = reading.microbatches_per_s / 4
        # What goes each way in a step: activations and gradients, 128 B each; rows, loss, "go".
        assert reading.sent_per_s / steps_per_s == pytest.approx(4 * 4 * 8 * 4, rel=0.2)
        assert reading.received_per_s / steps_per_s == pytest.approx(4 * 4 * 8 * 4, rel=0.2)


HANG = """
    import os, signal, time
    import barepp

    with barepp.init() as world:
        world.barrier()
        if world.rank == 0:
            world.recv(1)
        elif world.rank == 1:
            while not os.path.exists("{go}"):
                pass
            world.send(__import__("torch").ones(1), 0)
        elif world.rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            world.barrier()
"""


def test_the_picture_of_a_job_that_hangs_names_who_waits_who_is_busy_and_who_is_stopped(tmp_path):
    go = tmp_path / "go"
    options = {"heartbeat_s": 60.0, "timeout_s": 60.0}
    with watched_job(tmp_path, HANG.replace("{go}", str(go)), 3, **options) as job:
        readings = Rates(local=True)
        taken = []

        def told() -> bool:
            taken[:] = readings.take(job.line.status()[1])
            return all((reading.state_s or 0) > 1 for reading in taken)

        eventually(told)
        waiting, busy, stopped = taken
        assert waiting.state == "waiting for a message from rank 1 with tag 0"
        assert busy.state == "in the script's own code"
        assert stopped.state.startswith("stopped; last heard: ")
        eventually(lambda: readings.take(job.line.status()[1])[1].cpu_percent > 0)
        assert not readings.take(job.line.status()[1])[2].cpu_percent
        os.kill(stopped.status.pid, signal.SIGCONT)
        go.touch()
    assert job.finish().code == 0, job.finish().report


def test_ranks_that_have_not_come_or_have_ended_are_told_apart(tmp_path):
    go, come = tmp_path / "go", tmp_path / "come"
    script = f"""
        import os, time
        import barepp
        def wait_for(path):
            while not os.path.exists(path):
                time.sleep(0.01)
        wait_for("{come}")
        with barepp.init() as world:
            rank = world.rank
        if rank == 1:
            wait_for("{go}")
    """
    with watched_job(tmp_path, script) as job:
        eventually(lambda: [r.state for r in job.line.status()[1]] == ["starting"] * 2)
        come.touch()
        there = ["ended with exit code 0", "has left the world"]
        eventually(lambda: [rank.state for rank in job.line.status()[1]] == there)
        go.touch()
    assert job.finish().code == 0


def test_a_job_of_a_function_is_named_by_it(tmp_path):
    go = tmp_path / "go"

    def wait_for_the_test(world):
        while not go.exists():
            time.sleep(0.01)
        return world.rank

    results: list[list[int]] = []
    thread = threading.Thread(target=lambda: results.append(barepp.run(wait_for_the_test, 2)))
    thread.start()
    eventually(lambda: os.getpid() in [door.pid for door in socket_names()])
    with line_to(str(os.getpid())) as line:
        assert line.status()[0].task.endswith("wait_for_the_test()")
    go.touch()
    thread.join()
    assert results == [[0, 1]]


def test_a_job_that_ends_ends_the_watch_well(tmp_path, capsys):
    go = tmp_path / "go"
    with watched_job(tmp_path, TRAIN_AND_WAIT.replace("{go}", str(go))) as job:
        settled(job)
        go.touch()
        assert main(["--interval", "0.1", str(os.getpid())]) == 0
    assert job.finish().code == 0
    shown = capsys.readouterr()
    assert shown.err == f"barepp.top: job {os.getpid()} has ended\n"
    assert "rank " in shown.out and shown.out.endswith("\n\n")
    assert main(["1"]) == 2
    assert capsys.readouterr().err == (
        "barepp.top: no job 1 of this user is running on this machine\n"
    )


WAIT = """
    import barepp, time
    with barepp.init() as world:
        world.barrier()
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
"""


def test_the_launcher_shows_the_picture_and_its_door_ends_with_it(tmp_path: Path) -> None:
    with launching(tmp_path, WAIT, "--world", "2", "--watch", "--interval", "0.2") as running:
        running.wait_for_line("ready", 2)
        assert running.process.stderr is not None
        rows = [""]
        while sum("in the script's own code" in row for row in rows) < 2:
            rows = [running.process.stderr.readline().decode() for _ in range(5)]  # one picture
            assert rows[0].startswith(f"job {running.process.pid}: "), rows
            assert rows[1].startswith("rank ") and rows[4] == "\n"
        assert running.process.pid in [door.pid for door in socket_names()]
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(10)
        eventually(lambda: running.process.pid not in [door.pid for door in socket_names()])
        assert_nothing_left(running)


@pytest.mark.parametrize("rich", [True, False])
def test_on_a_terminal_one_picture_is_redrawn_and_ctrl_c_ends_it_and_not_the_job(
    rich: bool, tmp_path: Path
):
    go = tmp_path / "go"
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    hide = "" if rich else "sys.modules['rich.live'] = None; "
    code = f"import sys; {hide}from barepp.top import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--interval", "0.2", str(os.getpid())]
    environ = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    with watched_job(tmp_path, TRAIN_AND_WAIT.replace("{go}", str(go))) as job:
        settled(job)
        with subprocess.Popen(command, stdout=slave, stderr=PIPE, env=environ) as top:
            drawn = ""
            while drawn.count("job ") < 4:
                drawn += os.read(master, 65536).decode()
            top.send_signal(signal.SIGINT)
            _, err = top.communicate(timeout=20)
            assert (top.returncode, err) == (0, b"")
            while select.select([master], [], [], 0.2)[0]:
                drawn += os.read(master, 65536).decode()
        job.line.status()
        go.touch()
    for fd in (master, slave):
        os.close(fd)
    assert job.finish().code == 0
    terminal = Terminal(100)
    terminal.write(drawn.replace("\r\n", "\n"))
    assert terminal.cursor_shown
    shown = [line for line in terminal.shown if line]
    assert len(shown) == 4
    assert shown[0].startswith(f"job {os.getpid()}: ")
    assert shown[1].startswith("rank ") and "in the script's own code" in shown[3]
