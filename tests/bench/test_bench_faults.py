"""`python -m barepp.bench faults`: what it sees of a job, what it calls right, and one real run."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
from jobs import LIMIT_S, ROOT
from starter import eventually

from barepp.bench.__main__ import main
from barepp.bench.faults.kinds import (
    BAREPP,
    FAULTS,
    SURVIVORS,
    TORCH,
    VICTIM,
    is_right,
    report_is_right,
)
from barepp.bench.faults.table import cells, row_of
from barepp.bench.faults.watch import Seen, command, watch
from barepp.errors import BareppError
from barepp.testing import leaks
from barepp.worker.failures import failure_of, failure_of_exit
from barepp.worker.faults.kinds import fault_action
from transport.errors import Failure, JobFailed

# -- one real run ----------------------------------------------------------------------------------


def test_a_killed_rank_is_measured(tmp_path):
    figures = tmp_path / "figures.json"
    command = ["-m", "barepp.bench", "faults", "--runs", "1", "--faults", "SIGKILL"]
    done = subprocess.run(
        [sys.executable, *command, "--json", str(figures)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| SIGKILL | barepp | 1 |" in done.stdout
    (row,) = json.loads(figures.read_text())["rows"]
    assert len(row["told_ms"]) == row["told_of"] == row["ranks_right"] == 3
    assert 0 < row["told_ms_median"] <= row["told_ms_worst"] < row["back_ms_worst"]
    assert (row["codes"], row["reports_right"]) == ([137], 1)
    assert (row["processes_left"], row["files_left"]) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--faults", "SIGKILL,plague"], "no fault 'plague'; there are SIGKILL, SIGTERM, SIGSEGV"),
        (["--runs", "0"], "--runs starts at 1"),
    ],
)
def test_wrong_usage_is_a_sentence(flags, why, capsys):
    assert main(["faults", *flags]) == 2
    assert why in capsys.readouterr().err


# -- what is seen of a job -------------------------------------------------------------------------

# (`barepp.bench.faults.watch` is also the name of its function.)
watching = importlib.import_module("barepp.bench.faults.watch")

PRELUDE = """
import json, os, subprocess, sys, time
notes = os.open(os.path.join(sys.argv[1], "notes"), os.O_WRONLY)
def note(event, rank, **fields):
    fields = {"monotonic": time.monotonic(), "pid": os.getpid(), "text": "", **fields}
    line = json.dumps({"event": event, "rank": rank, **fields}) + "\\n"
    os.write(notes, line.encode())
"""


def pretend(text):
    """Return a command line whose "launcher" does what the text says."""
    return [sys.executable, "-c", PRELUDE + textwrap.dedent(text)]


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_times_count_from_the_fault_and_only_the_first_word_counts():
    seen = watch(
        pretend("""
            now = time.monotonic()
            note("training", 0)
            note("injected", 2, monotonic=now)
            note("told", 0, text="first", monotonic=now + 0.005)
            note("told", 0, text="second", monotonic=now + 0.009)
            note("told", 2, text="the victim's own")
            print("one"); print("two", file=sys.stderr)
            sys.exit(7)
        """)
    )
    assert seen.told == {0: (pytest.approx(5.0), "first")}
    assert (seen.code, sorted(seen.output.split())) == (7, ["one", "two"])
    assert (seen.processes, seen.files) == ([], [])
    assert seen.back is not None and seen.back > 0


def test_a_launcher_that_a_signal_ended_has_the_code_that_a_shell_shows():
    seen = watch(pretend("note('injected', 2); os.kill(os.getpid(), 9)"))
    assert seen.code == 128 + signal.SIGKILL


def test_what_outlives_the_launcher_is_counted_then_killed(monkeypatch):
    monkeypatch.setattr(leaks, "PATIENCE_S", 0.3)
    seen = watch(
        pretend("""
            orphan = subprocess.Popen(["sleep", "600"], start_new_session=True)
            note("training", 1, pid=orphan.pid)
            open(os.path.join(os.environ["TMPDIR"], "forgotten"), "w").close()
            note("injected", 2)
        """)
    )
    [pid] = seen.processes
    assert (seen.files, seen.code) == (["forgotten"], 0)
    eventually(lambda: is_gone(pid))  # a kill strikes when its process is next scheduled


def test_a_launcher_that_does_not_come_back_is_given_up(monkeypatch):
    monkeypatch.setattr(watching, "LIMIT_S", 0.3)
    monkeypatch.setattr(leaks, "PATIENCE_S", 0.3)
    seen = watch(
        pretend("""
            note("training", 0)
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            print(os.getpid(), child.pid, flush=True)
            note("injected", 2)
            time.sleep(600)
        """)
    )
    assert (seen.back, seen.code) == (None, None)
    assert seen.processes == sorted(map(int, seen.output.split()))
    eventually(lambda: all(map(is_gone, seen.processes)))


def test_a_job_that_ends_before_its_fault_is_no_measurement():
    with pytest.raises(BareppError, match="the fault never came; the job said\noh no"):
        watch(pretend("print('oh no')"))


# -- what is called right --------------------------------------------------------------------------

REAL = {
    "SIGKILL": failure_of_exit(VICTIM, -signal.SIGKILL),
    "SIGTERM": failure_of_exit(VICTIM, -signal.SIGTERM),
    "SIGSEGV": failure_of_exit(VICTIM, -signal.SIGSEGV),
    "SIGABRT": failure_of_exit(VICTIM, -signal.SIGABRT),
    "exit:0": failure_of_exit(VICTIM, 0),
    "exit:7": failure_of_exit(VICTIM, 7),
    "raise:ValueError": failure_of(VICTIM, ValueError("injected"), "computing 2F3"),
}


@pytest.mark.parametrize("name", REAL)
def test_right_means_this_rank_and_this_cause(name):
    told = str(JobFailed(REAL[name], "waiting for the input of 1B2"))
    assert {other for other in FAULTS if is_right(other, BAREPP, told)} == {name}
    another = Failure(1, "lost", REAL[name].message)
    assert not is_right(name, BAREPP, str(JobFailed(another)))


REPORT = """
    rank 2 says: SIGKILL
Root Cause (first observed failure):
[0]:
  rank      : {rank} (local_rank: {rank})
  exitcode  : -9 (pid: 18006)
  traceback : Signal 9 (SIGKILL) received by PID 18006
"""


def test_torchruns_root_cause_is_read_and_what_stands_before_it_is_not():
    right, wrong = (REPORT.format(rank=rank) for rank in (VICTIM, 1))
    assert report_is_right("SIGKILL", TORCH, right) and not report_is_right("SIGTERM", TORCH, right)
    assert not report_is_right("SIGKILL", TORCH, wrong)
    assert not report_is_right("hang", TORCH, "[rank2]: Timed out")  # no root cause
    assert not is_right("SIGKILL", TORCH, "Connection closed by peer [127.0.0.1]:40170")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("exit:7", "rank 2 exitcode  : 7"),
        ("raise:ValueError", "rank: 2 ValueError"),
        ("SIGSTOP", "rank 2: Timed out waiting"),
        ("hang", "rank 2: timeout"),
    ],
)
def test_torch_is_given_the_benefit_of_the_doubt(fault, text):
    assert is_right(fault, TORCH, text)
    assert not is_right(fault, TORCH, text.replace("2", "1"))
    assert not is_right("SIGKILL", TORCH, text)


GOOD = "rank 2 failed: it was killed by SIGKILL"


def seen_kill(**changes):
    told = {rank: (2.0 * (rank + 1), GOOD) for rank in SURVIVORS}
    fields = {"told": told, "back": 90.0, "code": 137, "output": f"barepp: {GOOD}\nmore\n"}
    return Seen(**{**fields, **changes})


def test_a_row_holds_every_rank_of_every_run():
    row = row_of("SIGKILL", BAREPP, [seen_kill(), seen_kill(back=110.0)])
    assert row["told_ms"] == [2.0, 4.0, 8.0] * 2 and row["told_of"] == 6
    assert cells(row) == (
        "| SIGKILL | barepp | 2 | 4.0 / 8.0 | 6/6 ranks, 2/2 reports | 100 / 110 | 137 | 2 "
        "| nothing |"
    )


def test_a_row_says_who_was_not_told_and_who_did_not_come_back():
    lost = seen_kill(told={0: (5.0, "")}, back=None, code=None, processes=[5, 6], files=["log"])
    assert cells(row_of("hang", TORCH, [lost])) == (
        "| hang, `--timeout 3` | torchrun | 1 | 5.0 / 5.0 (1 of 3) | 0/3 ranks, 0/1 reports "
        "| not in 15 s | – | 2 | 2 processes, 1 file |"
    )


def test_only_what_is_right_counts_as_right():
    wrong = seen_kill(
        told={rank: (1.0, GOOD.replace("2", "1")) for rank in SURVIVORS},
        output="barepp: rank 1 failed: it was killed by SIGKILL",
        code=1,
    )
    row = row_of("SIGKILL", BAREPP, [seen_kill(), wrong])
    assert (len(row["told_ms"]), row["ranks_right"], row["reports_right"]) == (6, 3, 1)
    assert " 1, 137 " in cells(row)


def test_every_fault_can_be_injected_and_ends_a_job():
    for name in FAULTS:
        assert fault_action(name).expected.cause
    assert command(BAREPP, "SIGSTOP")[-3:] == ["script.py", BAREPP, "SIGSTOP"]
    assert "--heartbeat" in command(BAREPP, "SIGSTOP")
