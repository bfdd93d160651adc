"""Every way for a rank to end a job: the cause, who is told what, the exit code, nothing left.

The launcher's own `Job` runs here with ranks forked from this process, which takes a tenth of a
second; the command line around it is tested in test_launch.py.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import Finished, loaded_machine, nothing_left, run_job

import barepp
from barepp.launch.job_state import Member
from barepp.launch.referee import Referee
from barepp.launch.report import report
from barepp.worker.failures import exit_code_of, failure_of
from transport.errors import RECORD_TEXT_LIMIT, Failure, PeerLeft, PeerLost
from transport.rendezvous.events import Event, EventKind
from transport.rendezvous.loop import EventLoop

# What survivors do: wait for rank 1 in one way or another, and show what they are told.
SURVIVE = """
    import barepp, faulthandler, os, signal, sys, threading, time, torch
    faulthandler.disable()   # pytest's, which would show the stacks of a process that aborts
    def fault(world):
        {fault}
    with barepp.init() as world:
        if world.transport.name == "gloo":   # the payload paths are open when the fault comes
            world.isend(torch.ones(9), (world.rank + 1) % 3)
            world.recv((world.rank - 1) % 3)
            if world.rank == 1:
                world.recv(0, tag=3), world.recv(2, tag=3)
            else:
                world.isend(torch.ones(9), 1, tag=3)
        if world.rank == 1:
            fault(world)
        try:
            if world.rank == 0:
                world.recv(1, tag=7)
            else:
                world.barrier()
        except barepp.JobFailed as error:
            print("told at", time.time(), "cause", error.failure.cause, "by", error.failure.rank)
            print(str(error))
            raise
"""

FAULTS = {
    # fault: (code, cause, what the message says)
    "raise ValueError('boom')": (1, "exception", "ValueError: boom"),
    "sys.exit(3)": (3, "exit", "it called sys.exit(3)"),
    "sys.exit(0)": (1, "exit", "it called sys.exit(0) before it had left the world"),
    "sys.exit()": (1, "exit", "it called sys.exit(None) before it had left the world"),
    "sys.exit('my last words')": (1, "exit", "it called sys.exit('my last words')"),
    "sys.exit(256 + 9)": (9, "exit", "it called sys.exit(265)"),
    "sys.exit(-1)": (255, "exit", "it called sys.exit(-1)"),
    "os._exit(7)": (7, "exit", "its process ended with exit code 7"),
    "os._exit(0)": (1, "exit", "exit code 0 before it had left the world"),
    "os.kill(os.getpid(), signal.SIGKILL)": (137, "signal", "it was killed by SIGKILL"),
    "os.kill(os.getpid(), signal.SIGTERM)": (143, "signal", "it was killed by SIGTERM"),
    "os.kill(os.getpid(), signal.SIGABRT)": (134, "signal", "it was killed by SIGABRT"),
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)": (1, "exception", "KeyboardInterrupt"),
    "raise MemoryError": (1, "exception", "MemoryError"),
    "raise KeyboardInterrupt": (1, "exception", "KeyboardInterrupt"),
    "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)": (
        1,
        "exception",
        "ZeroDivisionError: division by zero",
    ),
    "world.recv(1)": (2, "exception", "rank 1 of 3 cannot receive from rank 1"),
    "world.recv(0, timeout=0.01)": (1, "exception", "WaitTimeout: nothing after 0.01 s of"),
}


# One of each kind for a transport whose payload paths end in ways of their own: an exception, the
# interpreter's end, the process's without it, and a signal.
FAULTS_OVER_GLOO = [
    "raise ValueError('boom')",
    "sys.exit(0)",
    "os._exit(7)",
    "os.kill(os.getpid(), signal.SIGKILL)",
]


@pytest.mark.parametrize(
    ("fault", "transport"),
    [*((fault, "auto") for fault in FAULTS), *((fault, "gloo") for fault in FAULTS_OVER_GLOO)],
)
def test_one_cause_told_to_everyone(fault: str, transport: str, tmp_path: Path) -> None:
    code, cause, message = FAULTS[fault]
    with nothing_left():
        job = run_job(tmp_path, SURVIVE.format(fault=fault), 3, transport=transport)
    assert job.code == code
    assert (job.failed["rank"], job.failed["cause"]) == (1, cause)
    assert message in job.failed["message"]
    # The launcher says it once, first, and then one line a rank.
    first, *rest = job.report.splitlines()
    assert first.startswith("barepp: rank 1 failed") and message in first
    assert "\n".join(rest).count(message) <= 2  # in the failing rank's own traceback
    assert job.err.count("Traceback") == (cause == "exception" and "recv(1)" not in fault)
    assert [line for line in rest if line.startswith("barepp: rank")] == [
        "barepp: rank 0 was told while waiting for a message from rank 1 with tag 7, and ended",
        "barepp: rank 2 was told while waiting at a barrier, and ended",
    ]
    # Every survivor raised one error that names rank and cause, and what it was about itself.
    for rank, doing in ((0, "waiting for a message from rank 1"), (2, "waiting at a barrier")):
        said = "\n".join(job.said(rank))
        assert f"cause {cause} by 1" in said
        assert message in said and doing in said
    assert "JobFailed" not in job.err  # no survivor's traceback
    check_events(job, 3)


def check_events(job: Finished, world_size: int) -> None:
    events = job.events
    assert all({"time", "event", "rank"} <= event.keys() for event in events)
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    started = {event["rank"]: event["pid"] for event in events if event["event"] == "started"}
    assert sorted(started) == list(range(world_size)) and len(set(started.values())) == world_size
    ended = {event["rank"]: event["exit_code"] for event in events if event["event"] == "ended"}
    assert sorted(ended) == list(range(world_size))
    assert sum(event["event"] == "failed" and event["primary"] for event in events) <= 1
    for pid in started.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "os._exit(3)"])
def test_who_dies_in_silence_is_shown_where_it_was_last_heard(ending: str, tmp_path: Path) -> None:
    text = f"""
        import barepp, os, time
        with barepp.init() as world:
            if world.rank == 1:
                world.activity = ("computing", "2F3")
                time.sleep(1.2)   # two signs of life
                {ending}
            world.recv(1)
    """
    job = run_job(tmp_path, text)
    last = r"(SIGKILL|code 3) \(last heard: computing 2F3, 0\.\d s before\)"
    assert re.search(last, job.failed["message"])
    assert re.search(last, job.report.splitlines()[0])


@pytest.mark.parametrize(
    ("next_call", "fate"),
    [
        ("world.isend(torch.ones(1), 1)", "sending to rank 1 with tag 0, and ended"),
        ("while True: pass", "in the script's own code, did not end by itself and was killed"),
    ],
)
def test_who_is_told_between_two_calls(next_call: str, fate: str, tmp_path: Path) -> None:
    """It raises in the next one, and is then about that; or there never is a next one."""
    text = f"""
        import barepp, os, torch, time
        with barepp.init() as world:
            if world.rank == 1:
                os._exit(3)
            while world.transport._ended is None:   # until the news is here
                time.sleep(0.01)
            {next_call}
    """
    job = run_job(tmp_path, text, grace_s=20.0 if "isend" in next_call else 1.0)
    assert job.code == 3
    assert f"barepp: rank 0 was told while {fate}" in job.report


def test_who_is_told_before_its_first_action_knows_what_it_was_about() -> None:
    """The fault matrix found a survivor that did not."""

    def work(world: barepp.World) -> str:
        pipe = barepp.Pipeline(world, barepp.mlp(3, 8), torch.nn.functional.cross_entropy)
        inputs, targets = torch.ones(8, 64), torch.zeros(8, dtype=torch.int64)
        batch = pipe._batch(inputs, targets, with_targets=True)
        world.barrier()
        world.transport.abort(barepp.JobFailed(barepp.Failure(0, "exit", "it is gone")))
        try:
            pipe._executor.train(pipe._program(batch, training=True), batch, pipe.recorder)
        except barepp.JobFailed as error:
            told = error.doing
        raise LookupError(told)

    with pytest.raises(barepp.JobFailed, match="LookupError: posting its receives"):
        barepp.run(work, 2, transport="inproc")


# -- in training ----------------------------------------------------------------------------------

TRAINING = """
    import barepp, torch

    class Bad(torch.nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.calls = 0
        def forward(self, x):
            self.calls += 1
            if self.calls == 7 and "{place}" == "forward":   # microbatch 2 of step 1
                raise ValueError("in the forward")
            return Through.apply(super().forward(x), self.calls == 7)

    class Through(torch.autograd.Function):
        def forward(context, x, bad):
            context.bad = bad and "{place}" == "backward"
            return x.clone()
        def backward(context, gradient):
            if context.bad:
                raise ValueError("in the backward")
            return gradient, None

    def loss_fn(output, target):
        if target[0] == 6 and "{place}" == "loss":
            raise ValueError("in the loss")
        return output.mean()

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 24
        def __getitem__(self, row):
            if row == 20 and "{place}" == "data" and world.rank == 0:
                raise ValueError("in the data")
            return torch.ones(8), row

    class Sgd(torch.optim.SGD):
        def step(self):
            if "{place}" == "optimizer" and world.rank == 1:
                raise ValueError("in the optimizer")
            super().step()

    with barepp.init() as world:
        layers = [lambda: torch.nn.Linear(8, 8), Bad, lambda: torch.nn.Linear(8, 8)]
        pipe = barepp.Pipeline(world, layers, loss_fn, num_microbatches=4)
        optimizer = Sgd(pipe.parameters(), lr=0.1)
        data = torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=1)
        for inputs, targets in data:
            pipe.zero_grad()
            pipe.step(inputs, targets)
            optimizer.step()
"""


@pytest.mark.parametrize(
    ("place", "rank", "told", "transport"),
    [
        ("forward", 1, "in layer 1 (Bad) of stage 1, forward of microbatch 2", "auto"),
        ("backward", 1, "in stage 1, backward of microbatch 2", "auto"),
        ("backward", 1, "in stage 1, backward of microbatch 2", "gloo"),
        ("loss", 2, "in the loss of microbatch 2, on stage 2", "auto"),
        ("data", 0, "Caught ValueError in DataLoader worker process 0.", "auto"),
        ("optimizer", 1, "in step", "auto"),
    ],
)
def test_an_exception_anywhere_in_training(
    place: str, rank: int, told: str, transport: str, tmp_path: Path
) -> None:
    with nothing_left():
        job = run_job(tmp_path, TRAINING.format(place=place), 3, transport=transport)
    assert job.code == 1
    assert (job.failed["rank"], job.failed["cause"]) == (rank, "exception")
    assert f"in the {place}" in job.failed["message"]
    assert job.report.startswith(f"barepp: rank {rank} failed")
    assert "Traceback" in job.report and "script.py" in job.report
    if sys.version_info >= (3, 11) or place in ("data", "optimizer"):  # older ones have no notes
        assert told in job.report
    others = [line for line in job.report.splitlines() if line.startswith("barepp: rank")][1:]
    survivors = [other for other in range(3) if other != rank]
    assert len(others) == 2
    for line, survivor in zip(others, survivors, strict=True):
        assert re.fullmatch(rf"barepp: rank {survivor} was told while .+, and ended", line)


# -- whose traceback ------------------------------------------------------------------------------


def test_the_report_shows_the_scripts_own_lines_and_none_of_ours(tmp_path: Path) -> None:
    text = """
        import barepp
        def deeper(): raise RuntimeError("in the script")
        with barepp.init() as world:
            if world.rank == 0:
                deeper()
            world.barrier()
    """
    job = run_job(tmp_path, text)
    frames = [line.strip() for line in job.report.splitlines() if "File " in line]
    assert [frame.split(", ")[1:] for frame in frames] == [
        ["line 6", "in <module>"],
        ["line 3", "in deeper"],
    ]
    assert "Traceback (most recent call last)" in job.log(0)
    assert "Traceback" not in job.log(1)


USAGE = {
    "world.send(torch.ones(1), 9)": "cannot send to rank 9: there is no such rank",
    "world.recv(0, tag=-1)": "a tag is an integer from 0 to 2**62 - 1, not -1",
    "barepp.make_schedule('zigzag', 2, 2)": "zigzag",
    "barepp.init()": "this process is in a world already",
}


@pytest.mark.parametrize("call", USAGE)
def test_a_wrong_call_is_answered_by_a_sentence_and_its_place(call: str, tmp_path: Path) -> None:
    text = f"""
        import barepp, torch
        with barepp.init() as world:
            if world.rank == 1:
                {call}
            world.barrier()
    """
    job = run_job(tmp_path, text)
    assert job.code == 2
    first = job.report.splitlines()[0]
    assert USAGE[call] in first
    assert first.endswith(f"({tmp_path}/script.py, line 5)")
    assert "Traceback" not in job.report and "transport/" not in job.report


def test_an_error_of_ours_is_shown_from_the_scripts_side(tmp_path: Path) -> None:
    text = """
        import barepp
        with barepp.init() as world:
            world.barrier(timeout=0.05) if world.rank == 0 else world.recv(0)
    """
    job = run_job(tmp_path, text)
    assert job.failed["message"] == "WaitTimeout: rank 0: nothing after 0.05 s at a barrier"
    assert job.report.count("File ") == 1 and "script.py" in job.report


def test_the_same_error_on_every_rank_is_printed_once(tmp_path: Path) -> None:
    text = """
        import barepp
        with barepp.init() as world:
            world.barrier()
            raise FileNotFoundError("no data here")
    """
    job = run_job(tmp_path, text, 4, grace_s=20.0)
    assert job.code == 1
    assert job.report.startswith("barepp: ranks 0-3 failed: FileNotFoundError: no data here\n")
    assert job.report.count("no data here") == 3  # headline, source line, last line of traceback
    assert job.report.count("barepp: ") == 1
    assert all("no data here" in job.log(rank) for rank in range(4))


def test_a_failure_before_init_is_the_cause_for_those_who_wait(tmp_path: Path) -> None:
    text = """
        import barepp, os
        if __import__("multiprocessing").current_process().name.endswith("-2"):
            raise ImportError("no module named numpy")
        try:
            barepp.init()
        except barepp.JobFailed as error:
            print("told", error)
            raise
    """
    job = run_job(tmp_path, text, 3)
    assert job.code == 1
    assert job.failed["rank"] == 2 and "no module named numpy" in job.failed["message"]
    assert "ImportError: no module named numpy" in job.out  # the others were told
    assert "waiting for all ranks to join" in job.err


@pytest.mark.parametrize("ending", ["pass", "import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_a_rank_that_never_calls_init_is_missed_at_once(ending: str, tmp_path: Path) -> None:
    text = f"""
        import barepp, multiprocessing
        if multiprocessing.current_process().name.endswith("-1"):
            {ending}
        else:
            barepp.init()
    """
    job = run_job(tmp_path, text, 3)
    assert job.code == 1 and job.seconds < 10.0
    assert job.failed["rank"] == 1
    assert "exit code 0 without having joined the others" in job.failed["message"]


def test_scripts_that_never_call_init_end_well(tmp_path: Path) -> None:
    job = run_job(tmp_path, "print('no world for me')", 3)
    assert job.code == 0
    assert job.out.count("no world for me") == 3


def test_a_rank_that_returns_early_waits_for_the_others(tmp_path: Path) -> None:
    text = """
        import barepp, torch, time
        with barepp.init() as world:
            if world.rank == 0:
                world.isend(torch.ones(1_000_000), 1)   # and leaves: the message still arrives
            elif world.rank == 1:
                time.sleep(0.2)   # it has work left to do
                print(world.recv(0).sum().item())
    """
    job = run_job(tmp_path, text, 3)
    assert (job.code, job.said(1)) == (0, ["1000000.0"])


def test_a_world_left_open_is_left_at_the_end_of_the_script(tmp_path: Path) -> None:
    text = """
        import atexit, barepp, threading, time
        world = barepp.init()
        atexit.register(print, "exit handler")
        threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
    """
    job = run_job(tmp_path, text)
    assert job.code == 0
    assert job.said(0) == job.said(1) == ["thread", "exit handler"]


def test_a_world_can_be_left_and_joined_again(tmp_path: Path) -> None:
    text = """
        import barepp, torch
        for number in range(3):
            with barepp.init() as world:
                if world.rank == 0:
                    world.send(torch.tensor(number), 1)
                else:
                    print(world.recv(0).item())
    """
    job = run_job(tmp_path, text)
    assert (job.code, job.said(1)) == (0, ["0", "1", "2"])


def test_exit_codes_after_the_world_are_the_scripts_own(tmp_path: Path) -> None:
    text = """
        import barepp, sys
        with barepp.init() as world:
            rank = world.rank
        sys.exit({code} if rank == 1 else 0)
    """
    assert run_job(tmp_path, text.format(code=0)).code == 0
    job = run_job(tmp_path, text.format(code=5))
    assert job.code == 5 and job.failed["message"] == "it called sys.exit(5)"


def test_a_crash_in_an_exit_handler_is_a_failure(tmp_path: Path) -> None:
    text = """
        import atexit, barepp, faulthandler, os, signal
        faulthandler.disable()
        with barepp.init() as world:
            if world.rank == 1:
                atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
    """
    job = run_job(tmp_path, text)
    assert (job.code, job.failed["signal"]) == (139, signal.SIGSEGV)


# -- who does not listen --------------------------------------------------------------------------


def test_a_busy_rank_is_ended_after_the_grace_with_what_it_was_about(tmp_path: Path) -> None:
    text = """
        import barepp, os, time
        with barepp.init() as world:
            world.barrier()
            if world.rank == 1:
                os._exit(9)
            if world.rank == 0:
                world.activity = ("computing", "2F3")
                while True: pass
            world.recv(0)
    """
    with nothing_left():
        job = run_job(tmp_path, text, 3, grace_s=0.2)
    assert job.code == 9 and job.seconds < 10.0
    assert "rank 0 was told while computing 2F3, did not end by itself and was killed" in job.report


def test_a_stopped_rank_is_ended_after_the_grace(tmp_path: Path) -> None:
    text = """
        import barepp, os, signal
        with barepp.init() as world:
            if world.rank == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            world.send(__import__("torch").ones(1), 2) if world.rank == 1 else None
            if world.rank == 2:
                world.recv(1)
                raise ValueError("boom")
            world.barrier()
    """
    with nothing_left():
        job = run_job(tmp_path, text, 3)
    assert job.code == 1 and job.failed["rank"] == 2


def test_a_survivor_that_swallows_the_error_changes_nothing(tmp_path: Path) -> None:
    text = """
        import barepp, sys
        try:
            with barepp.init() as world:
                if world.rank == 1: sys.exit(4)
                while True:
                    try:
                        world.recv(1)
                    except barepp.JobFailed:
                        break
        except barepp.JobFailed as error:
            print("leaving failed too:", error.failure.message)
    """
    job = run_job(tmp_path, text, 2)
    assert job.code == 4
    assert job.said(0) == ["leaving failed too: it called sys.exit(4)"]


def test_a_rank_that_fails_later_is_shown_in_one_line(tmp_path: Path) -> None:
    text = """
        import barepp, torch
        with barepp.init() as world:
            if world.rank == 1:
                world.recv(0)
                raise ValueError("the cause")
            try:
                world.send(torch.ones(1), 1)
                world.recv(1)
            except barepp.JobFailed:
                raise OSError("a consequence\\nwith a second line")
    """
    job = run_job(tmp_path, text, 2)
    # (It may be told between two calls, when it is about nothing.)
    last = r"barepp: rank 0 (was told while .*, then )?failed as well: OSError: a consequence"
    assert re.fullmatch(last, job.report.splitlines()[-1])
    assert [event["primary"] for event in job.events if event["event"] == "failed"] == [True, False]
    assert "a consequence" not in job.report.splitlines()[0]


# -- what a script forks --------------------------------------------------------------------------


def test_a_process_that_the_script_forks_is_no_rank(tmp_path: Path) -> None:
    text = """
        import barepp, os, sys, threading
        with barepp.init() as world:
            for ending in ("exit", "raise", "return", "thread"):
                child = os.fork()
                if child == 0:
                    try:
                        world.barrier(timeout=0.2)
                    except Exception as error:
                        print("child:", type(error).__name__)
                    if ending == "exit": sys.exit(3)
                    if ending == "raise": raise ValueError("the child's own affair")
                    if ending == "thread":
                        thread = threading.Thread(target=lambda: 1 / 0)
                        thread.start()
                        thread.join()
                    break
                os.waitpid(child, 0)
            else:
                world.barrier()
                print("still a rank")
    """
    with nothing_left():
        job = run_job(tmp_path, text, 2)
    assert job.code == 0, job.err
    for rank in range(2):
        assert job.said(rank).count("child: TransportClosed") == 4
        assert job.said(rank).count("still a rank") == 1


def test_what_a_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    text = """
        import barepp, os, subprocess, sys, time
        with barepp.init() as world:
            subprocess.Popen(["sleep", "1000"])
            if os.fork() == 0:
                time.sleep(1000)   # it holds the rank's sockets and pipes open
            world.barrier()
            if world.rank == 1: os._exit(5)
            world.recv(1)
    """
    with nothing_left():
        job = run_job(tmp_path, text, 3)
    assert job.code == 5 and job.seconds < 10.0


# -- strange texts --------------------------------------------------------------------------------


def test_an_exception_that_cannot_be_shown_is_still_reported(tmp_path: Path) -> None:
    text = """
        import barepp
        class Nasty(Exception):
            def __str__(self): raise RuntimeError("no text for you")
        with barepp.init() as world:
            if world.rank == 1: raise Nasty
            world.recv(1)
    """
    job = run_job(tmp_path, text)
    assert job.failed["message"] == "Nasty: (its text cannot be shown: RuntimeError)"


def test_a_huge_and_evil_message_is_bounded_and_escaped(tmp_path: Path) -> None:
    text = """
        import barepp
        with barepp.init() as world:
            if world.rank == 1: raise ValueError("\\x1b[2J\\udcff" + "x" * 20_000_000)
            world.recv(1)
    """
    job = run_job(tmp_path, text)
    assert job.code == 1
    assert len(job.failed["message"]) <= RECORD_TEXT_LIMIT
    assert len(job.report) <= 2 * RECORD_TEXT_LIMIT
    assert "\x1b" not in job.report and "\\x1b[2J\\udcff" in job.report


# -- decisions under load -------------------------------------------------------------------------

RACES = {
    "raise ValueError('boom')": ("exception", 1),
    "os.kill(os.getpid(), 9)": ("signal", 137),
    "os._exit(6)": ("exit", 6),
    "sys.exit(0)": ("exit", 1),
}


@pytest.mark.xdist_group("timed")
def test_the_decision_is_right_every_time_on_a_loaded_machine(tmp_path: Path) -> None:
    """A rank's words, its end and its peers' complaints race each other to the launcher."""
    text = """
        import barepp, os, sys, torch
        with barepp.init() as world:
            world.barrier()
            if world.rank == 2:
                {fault}
            try:
                world.isend(torch.ones(100_000), 2)
                world.recv(2)
            except barepp.JobFailed as error:
                print("told by", error.failure.rank)
                raise
    """
    with loaded_machine():
        for number in range(12):
            fault = list(RACES)[number % len(RACES)]
            cause, code = RACES[fault]
            job = run_job(tmp_path, text.format(fault=fault), 4, grace_s=10.0)
            assert (job.code, job.failed["rank"], job.failed["cause"]) == (code, 2, cause), job.err
            for rank in (0, 1, 3):
                assert f"barepp: rank {rank} was told" in job.err  # wherever that found it
                assert f"[rank {rank}] told by 2" in job.out


@pytest.mark.xdist_group("timed")
def test_healthy_ends_are_right_every_time_on_a_loaded_machine(tmp_path: Path) -> None:
    text = """
        import barepp
        with barepp.init() as world:
            world.barrier()
    """
    with loaded_machine():
        for _ in range(6):
            job = run_job(tmp_path, text, 4)
            assert job.code == 0, job.err


def test_a_late_launcher_still_finds_the_first_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher is held up for a second: by then a survivor has complained of its lost peer."""
    joined: set[int] = set()
    take, turn = Referee.take, EventLoop.turn

    def noting_take(self: Referee, event: Event) -> None:
        take(self, event)
        if event.kind is EventKind.JOINED:
            joined.add(event.rank)

    def slow_turn(self: EventLoop) -> None:
        if len(joined) == 3:
            joined.clear()
            time.sleep(1.2)
        turn(self)

    monkeypatch.setattr(Referee, "take", noting_take)
    monkeypatch.setattr(EventLoop, "turn", slow_turn)
    text = """
        import barepp, os, time
        with barepp.init() as world:
            if world.rank == 2: os.kill(os.getpid(), 9)
            world.recv(2)
    """
    job = run_job(tmp_path, text, 3)
    assert (job.code, job.failed["rank"], job.failed["cause"]) == (137, 2, "signal")
    later = [e for e in job.events if e["event"] == "failed" and not e["primary"]]
    assert later and all(event["cause"] == "lost" for event in later)


def test_a_loss_that_nobody_explains_is_reported_itself(tmp_path: Path) -> None:
    text = """
        import barepp, os, time
        with barepp.init() as world:
            world.barrier()
            if world.rank == 1:
                for peer in world.transport._peers.values():   # the network breaks, nobody dies
                    peer.socket.shutdown(2)
                time.sleep(30)
            world.send(__import__("torch").ones(1), 1)
            world.recv(1)
    """
    text = text.replace(
        "world.barrier()",
        "world.recv(0) if world.rank else world.send(__import__('torch').ones(1), 1)",
    )
    job = run_job(tmp_path, text, 2)
    assert job.code == 1
    assert (job.failed["rank"], job.failed["cause"]) == (0, "lost")
    assert "rank 1" in job.failed["message"]


# -- the pure part --------------------------------------------------------------------------------


def test_a_usage_error_raised_outside_of_any_script_has_no_place() -> None:
    from barepp.errors import UsageError

    failure = failure_of(2, UsageError("no ranks"))
    assert (failure.message, failure.traceback, failure.exit_code) == ("no ranks", "", 2)


def test_whoever_is_not_known_to_have_been_told_is_not_said_to_have_been() -> None:
    """As it is with a rank that ends by itself on a node whose network has been cut just before."""
    silent, told, *cut = (Member(rank, joined=True, status=1, exit_code=1) for rank in range(1, 5))
    told.doing = cut[0].cut_off = "waiting at a barrier"
    cut[1].cut_off = ""
    assert report(Failure(0, "lost", "gone"), [silent, told, *cut]).splitlines() == [
        "barepp: rank 0 failed: gone",
        "barepp: rank 1 ended with exit code 1, and nobody has heard why",
        "barepp: rank 2 was told while waiting at a barrier, and ended",
        "barepp: rank 3 lost its connection to the launcher while waiting at a barrier, and ended",
        "barepp: rank 4 lost its connection to the launcher, and ended",
    ]


@pytest.mark.parametrize(
    ("code", "expected"), [(None, 0), (0, 0), (7, 7), (256 + 3, 3), (-1, 255), ("a text", 1)]
)
def test_the_exit_code_is_the_one_that_the_kernel_keeps(code: object, expected: int) -> None:
    assert exit_code_of(SystemExit(code)) == expected


@pytest.mark.parametrize("kind", [PeerLost, PeerLeft])
def test_a_lost_peer_is_a_consequence(kind: type[Exception]) -> None:
    assert failure_of(1, kind("rank 2 is gone")).cause == "lost"
