"""`python -m barepp.bench faults`: what it sees of a job, what it calls right, and one real run."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
from jobs import LIMIT_S, ROOT
from starter import eventually

from barepp.bench.__main__ import main
from barepp.bench.faults.kinds import FAULTS, NO_FAULT, VICTIM
from barepp.bench.faults.table import BAREPP, TORCH, is_right, root_cause, row_of
from barepp.bench.faults.watch import Seen, watch
from barepp.errors import BareppError
from barepp.worker.failures import failure_of, failure_of_exit
from transport.errors import Failure, JobFailed

# -- one real run ----------------------------------------------------------------------------------


def test_a_killed_rank_is_measured(tmp_path):
    figures = tmp_path / "figures.json"
    command = ["-m", "barepp.bench", "faults", "--runs", "1", "--faults", "kill"]
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
    assert (row["codes"], row["reports_right"], row["again"]) == ([137], 1, True)
    assert (row["processes_left"], row["files_left"]) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--faults", "kill,plague"], "there is no fault 'plague'; there are kill, term"),
        (["--runs", "0"], "nothing to run"),
        (["--runs", "-1", "--against", "torch"], "nothing to run"),
    ],
)
def test_wrong_usage_is_a_sentence(flags, why, capsys):
    assert main(["faults", *flags]) == 2
    assert why in capsys.readouterr().err


# -- what is seen of a job -------------------------------------------------------------------------

# (`from barepp.bench.faults import watch` is its function.)
faults_run = importlib.import_module("barepp.bench.faults.watch")

PRELUDE = """
import json, os, subprocess, sys, time
fault, folder = sys.argv[1:]
records = os.open(os.path.join(folder, "records"), os.O_WRONLY)
def say(what, rank, text="", pid=os.getpid(), at_ns=None):
    fields = {"what": what, "rank": rank, "pid": pid, "text": text}
    fields["at_ns"] = at_ns or time.monotonic_ns()
    os.write(records, json.dumps(fields).encode() + b"\\n")
"""


def pretend(text):
    """Return a command line whose "launcher" does what the text says."""
    return lambda fault: [sys.executable, "-c", PRELUDE + textwrap.dedent(text)]


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_times_count_from_the_fault_and_only_the_first_word_counts():
    seen = watch(
        pretend("""
            now = time.monotonic_ns()
            say("joining", 2)
            say("fault", 2, at_ns=now)
            say("told", 0, "first", at_ns=now + 5_000_000)
            say("told", 0, "second", at_ns=now + 9_000_000)
            print("one"); print("two", file=sys.stderr)
            sys.exit(7)
        """),
        FAULTS["kill"],
    )
    assert seen.told == {0: (5.0, "first")}
    assert (seen.code, sorted(seen.output.split()), seen.left) == (7, ["one", "two"], [])
    assert seen.back is not None and seen.back > 0 and seen.ended.keys() == {2}


def test_a_launcher_that_a_signal_ended_has_the_code_that_a_shell_shows():
    seen = watch(pretend("say('fault', 2); os.kill(os.getpid(), 9)"), FAULTS["kill"])
    assert seen.code == 128 + signal.SIGKILL


def test_what_outlives_the_launcher_is_counted_then_killed(monkeypatch):
    monkeypatch.setattr(faults_run, "ORPHAN_S", 0.3)
    seen = watch(
        pretend("""
            orphan = subprocess.Popen(["sleep", "600"], start_new_session=True)
            say("joining", 1, pid=orphan.pid)
            open(os.path.join(os.environ["TMPDIR"], "forgotten"), "w").close()
            say("fault", 2)
        """),
        FAULTS["kill"],
    )
    process, file = seen.left
    assert file == "forgotten" and seen.code == 0 and 1 not in seen.ended
    pid = int(process.split()[1])
    eventually(lambda: is_gone(pid))  # a kill strikes when its process is next scheduled


def test_a_launcher_that_does_not_come_back_is_given_up(monkeypatch):
    monkeypatch.setattr(faults_run, "LIMIT_S", 0.3)
    seen = watch(
        pretend("""
            say("joining", 0)
            print(os.getpid(), flush=True)
            say("fault", 2)
            time.sleep(600)
        """),
        FAULTS["stop"],
    )
    assert (seen.back, seen.code, len(seen.left)) == (None, None, 1)
    assert is_gone(int(seen.output))


def test_a_job_that_ends_before_its_fault_is_no_measurement():
    with pytest.raises(BareppError, match="the fault 'kill' never came; the job said\noh no"):
        watch(pretend("print('oh no')"), FAULTS["kill"])


def test_a_launcher_is_struck_when_its_ranks_are_ready():
    seen = watch(pretend("say('fault', 2); time.sleep(600)"), FAULTS["interrupt"])
    assert "KeyboardInterrupt" in seen.output
    assert watch(pretend("say('fault', 2); time.sleep(600)"), FAULTS["launcher"]).code == 137


def test_the_latecomer_counts_from_the_first_that_came():
    seen = watch(
        pretend("""
            now = time.monotonic_ns()
            say("joining", 0, at_ns=now)
            say("joining", 1, at_ns=now + 1_000_000_000)
            say("told", 0, "late", at_ns=now + 2_500_000_000)
        """),
        FAULTS["absent"],
    )
    assert seen.told[0] == (2500.0, "late")


# -- what is called right --------------------------------------------------------------------------

REAL = {
    "kill": failure_of_exit(VICTIM, -signal.SIGKILL),
    "term": failure_of_exit(VICTIM, -signal.SIGTERM),
    "segv": failure_of_exit(VICTIM, -signal.SIGSEGV),
    "abrt": failure_of_exit(VICTIM, -signal.SIGABRT),
    "exit0": failure_of_exit(VICTIM, 0),
    "exit7": failure_of_exit(VICTIM, 7),
    "sysexit3": failure_of(VICTIM, SystemExit(3), "computing 2F3"),
    "exception": failure_of(VICTIM, ValueError("injected"), "computing 2F3"),
}


@pytest.mark.parametrize("name", REAL)
def test_right_means_this_rank_and_this_cause(name):
    told = str(JobFailed(REAL[name], "waiting for the input of 1B2"))
    same = {other for other in REAL if is_right(FAULTS[other], BAREPP, told)}
    assert same == {name}
    another = Failure(1, "lost", REAL[name].message)
    assert not is_right(FAULTS[name], BAREPP, str(JobFailed(another)))


REPORT = """
    rank 2 says: SIGKILL
Root Cause (first observed failure):
[0]:
  rank      : {rank} (local_rank: {rank})
  exitcode  : -9 (pid: 18006)
  traceback : Signal 9 (SIGKILL) received by PID 18006
"""


def test_torchruns_root_cause_is_read_and_what_stands_before_it_is_not():
    right, wrong = (root_cause(REPORT.format(rank=rank)) for rank in (VICTIM, 1))
    assert is_right(FAULTS["kill"], TORCH, right) and not is_right(FAULTS["term"], TORCH, right)
    assert not is_right(FAULTS["kill"], TORCH, wrong)
    assert root_cause("[rank2]: Timed out") == ""
    assert not is_right(FAULTS["kill"], TORCH, "Connection closed by peer [127.0.0.1]:40170")


GOOD = "rank 2 failed: it was killed by SIGKILL"


def seen_kill(**changes):
    told = {rank: (2.0 * (rank + 1), GOOD) for rank in (0, 1, 3)}
    fields = {"told": told, "back": 90.0, "code": 137, "output": f"barepp: {GOOD}\nmore\n"}
    return Seen("kill", **{**fields, **changes})


def test_a_row_holds_every_rank_of_every_run():
    row = row_of(FAULTS["kill"], BAREPP, [seen_kill(), seen_kill(back=110.0)], again=True)
    assert row.told_ms == [2.0, 4.0, 8.0] * 2 and row.told_of == 6
    assert row.misses(FAULTS["kill"]) == []
    assert row.cells() == (
        "| SIGKILL | barepp | 2 | 4.0 / 8.0 | 6/6 ranks, 2/2 reports | 100 / 110 | 137 | 2 "
        "| nothing | yes |"
    )


@pytest.mark.parametrize(
    ("changes", "miss"),
    [
        ({"told": {0: (1.0, GOOD), 1: (1.0, GOOD)}}, "5 of 6 ranks"),
        ({"told": {r: (1.0, GOOD.replace("2", "1")) for r in (0, 1, 3)}}, "3 of 6 ranks"),
        ({"told": dict.fromkeys((0, 1, 3), (501.0, GOOD))}, "told after 501 ms, over 500"),
        ({"output": "barepp: rank 1 failed: it was killed by SIGKILL"}, "1 of 2 reports"),
        ({"code": 1}, r"exit codes \[1, 137\], not 137"),
        ({"back": 1001.0}, "back after 1001 ms, over 1000"),
        ({"back": None}, "back after 90 ms, over 1000"),
        ({"left": ["process 12"]}, "left behind"),
        ({"left": ["forgotten"]}, "left behind"),
    ],
)
def test_each_shortfall_is_told(changes, miss):
    row = row_of(FAULTS["kill"], BAREPP, [seen_kill(), seen_kill(**changes)], again=True)
    assert any(re.search(miss, found) for found in row.misses(FAULTS["kill"]))


def test_a_slow_median_and_a_command_that_fails_afterwards_are_told():
    slow = dict.fromkeys((0, 1, 3), (150.0, GOOD))
    row = row_of(FAULTS["kill"], BAREPP, [seen_kill(told=slow)], again=False)
    assert row.misses(FAULTS["kill"]) == [
        "told after more than 100 ms in the median",
        "the same command did not succeed afterwards",
    ]


def test_a_fault_that_takes_time_to_find_is_given_that_time():
    fault = FAULTS["stop"]
    text = "rank 2 failed: no sign of life for 2 s: its process is stopped"
    told = dict.fromkeys((0, 1, 3), (2900.0, text))
    seen = Seen("stop", told=told, back=2950.0, code=124, output=text)
    assert row_of(fault, BAREPP, [seen], again=True).misses(fault) == []


def test_a_busy_rank_has_to_be_in_the_report():
    fault = FAULTS["busy"]
    told = dict.fromkeys((1, 3), (9.0, GOOD))
    fate = "rank 0 was told while computing 0F3, did not end by itself and was killed"
    seen = seen_kill(told=told, ended={0: 520.0}, output=f"barepp: {GOOD}\nbarepp: {fate}\n")
    row = row_of(fault, BAREPP, [seen], again=True)
    assert row.misses(fault) == [] and "9.0 / 9.0; busy one ended 520 / 520 |" in row.cells()
    seen.output = f"barepp: {GOOD}\nbarepp: rank 0 was told, and ended\n"
    assert row_of(fault, BAREPP, [seen], again=True).reports_right == 0


def test_a_killed_launcher_is_back_when_its_last_rank_has_ended():
    fault = FAULTS["launcher"]
    text = "the job failed: the launcher, which served the rendezvous, is gone"
    told = dict.fromkeys(range(4), (9.0, text))
    ended = {rank: 20.0 + rank for rank in range(4)}
    seen = Seen("launcher", told=told, ended=ended, back=1.0, code=137)
    row = row_of(fault, BAREPP, [seen], again=True)
    assert (row.back_ms, row.reports_right, row.misses(fault)) == ([23.0], None, [])
    seen.left = ["process 12"]
    assert "| not in 2 s |" in row_of(fault, BAREPP, [seen], again=True).cells()


def test_every_fault_says_what_its_launcher_owes():
    assert NO_FAULT.name not in FAULTS
    for name, fault in FAULTS.items():
        assert fault.name == name and fault.words and fault.theirs and fault.code
        assert VICTIM not in fault.told or fault.code in (130, 137)
    assert os.path.basename(faults_run.barepp_command(FAULTS["stop"])[-1]) == "script_barepp.py"
    assert "--heartbeat" in faults_run.barepp_command(FAULTS["stop"])
