"""`barepp.testing`: a fault happens when and where it was asked for, and its outcome is told."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ROOT, nothing_left, run_job, write_script

import barepp
from barepp.program.actions import Action
from barepp.testing import FaultOutcome, Survivor, run_with_fault
from barepp.worker.faults.kinds import DEADLY, Fault, fault_action
from barepp.worker.world import World
from transport.errors import Failure, UnknownTransport

SOON_S = 5.0  # for what takes milliseconds, on a machine that is loaded

SCRIPT = """
    import barepp, faulthandler, sys, torch
    faulthandler.disable()   # pytest's, which would show the stacks of a process that aborts
    with barepp.init() as world:
        pipe = barepp.Pipeline(
            world, barepp.mlp(5, 8, 8, 3), torch.nn.functional.cross_entropy,
            schedule="1f1b", num_microbatches=4,
        )
        for step in range(3):
            pipe.forward(torch.ones(4, 8))   # no training: the same actions, and no fault
            print("step", step, sys.argv[1:], flush=True)
            pipe.step(torch.ones(8, 8), torch.zeros(8, dtype=torch.int64))
"""


def run(folder: Path, text: str = SCRIPT, **asked: object) -> FaultOutcome:
    asked = {"world": 3, "rank": 1, "at": "1F2", "fork": True, **asked}
    with nothing_left():
        return run_with_fault(write_script(folder, text), **asked)  # type: ignore[arg-type]


def train(world: World, steps: int = 2) -> None:
    pipe = barepp.Pipeline(
        world, barepp.mlp(5, 8, 8, 3), torch.nn.functional.cross_entropy, num_microbatches=4
    )
    for _ in range(steps):
        pipe.step(torch.ones(8, 8), torch.zeros(8, dtype=torch.int64))


# -- five lines -----------------------------------------------------------------------------------


def test_five_lines_for_a_script_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's own, from a fresh fork server; only its second is for a machine of one's own."""
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if "run_with_fault" in block]
    assert len([line for line in code.splitlines() if line]) <= 5
    assert "told_within_s=1.0" in code
    namespace: dict[str, Any] = {}
    exec(code.replace("told_within_s=1.0", f"told_within_s={SOON_S}"), namespace)
    write_script(tmp_path, SCRIPT, "train.py")
    monkeypatch.chdir(tmp_path)
    with nothing_left():
        namespace["test_a_death_in_training"]()


def test_what_the_five_lines_return(tmp_path: Path) -> None:
    outcome = run(tmp_path, world=4, rank=2, at="2F3")
    assert outcome.fault == Fault(2, Action.parse("2F3"), "during", "SIGKILL", 0)
    assert (outcome.happened, outcome.exit_code, outcome.leftovers) == (True, 137, [])
    assert outcome.cause is not None and outcome.cause.message.startswith(
        "it was killed by SIGKILL"
    )
    assert outcome.report.startswith("barepp: rank 2 failed: it was killed by SIGKILL")
    assert outcome.ended_after_s is not None and 0 < outcome.ended_after_s < outcome.seconds
    assert barepp.testing.run_with_fault is run_with_fault


# -- what can happen ------------------------------------------------------------------------------

FAULTS = {
    # fault: (cause, exit code, what the message says)
    "SIGKILL": ("signal", 137, "killed by SIGKILL"),
    "SIGTERM": ("signal", 143, "killed by SIGTERM"),
    "SIGSEGV": ("signal", 139, "killed by SIGSEGV"),
    "SIGABRT": ("signal", 134, "killed by SIGABRT"),
    "exit:0": ("exit", 1, "exit code 0 before it had left the world"),
    "exit:7": ("exit", 7, "exit code 7"),
    "raise": ("exception", 1, "InjectedError: injected by a test"),
    "raise:MemoryError": ("exception", 1, "MemoryError: injected by a test"),
    "raise:KeyboardInterrupt": ("exception", 1, "KeyboardInterrupt: injected by a test"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_to_everyone(fault: str, tmp_path: Path) -> None:
    cause, code, words = FAULTS[fault]
    outcome = run(tmp_path, fault=fault, step=1)
    outcome.check(told_within_s=SOON_S, ended_within_s=SOON_S)
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.cause, outcome.exit_code) == (1, cause, code)
    assert words in outcome.cause.message
    assert outcome.output.count("step 1") == 3 and "step 2" not in outcome.output
    assert sorted(outcome.survivors) == [0, 2]
    for survivor in outcome.survivors.values():
        assert survivor.told == outcome.cause
        # (On a loaded machine it may be at what needs nothing of 1F2 still.)
        at = r"waiting for the input of .*|computing (0F\d|0B0|2[FB][01])"
        assert re.fullmatch(at, survivor.doing), survivor
        assert survivor.exit_code == 1 and not survivor.killed


@pytest.mark.parametrize(
    ("fault", "limit"), [("SIGSTOP", {"heartbeat": 2.0}), ("hang", {"timeout": 2.0})]
)
def test_a_rank_that_hangs_is_named_within_the_limit(
    fault: str, limit: dict[str, float], tmp_path: Path
) -> None:
    outcome = run(tmp_path, fault=fault, **limit)
    outcome.check(ended_within_s=2 + SOON_S)
    assert outcome.ended_after_s is not None and outcome.ended_after_s > 1.0
    assert outcome.exit_code == 124


def test_a_delay_changes_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, fault="delay:0.3")
    outcome.check()
    assert (outcome.exit_code, outcome.cause, outcome.report) == (0, None, "")
    assert outcome.ended_after_s is not None and outcome.ended_after_s > 0.3
    assert [str(survivor) for survivor in outcome.survivors.values()] == [
        "rank 0 ended well",
        "rank 2 ended well",
    ]


# -- when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["0F1", "1F1", "2F1", "0B1", "1B1", "2B1"])
def test_during_is_in_the_midst_of_the_computation(at: str, tmp_path: Path) -> None:
    """The stack shows it: in a layer or in the loss forwards, in autograd's engine backwards."""
    outcome = run(tmp_path, rank=int(at[0]), at=at, fault="raise")
    outcome.check(told_within_s=SOON_S)
    assert outcome.cause is not None
    stack = outcome.cause.traceback
    assert "in __torch_dispatch__" in stack
    where = "= _run_backward(" if "B" in at else "in forward"
    assert where in stack and "stage.py" in stack
    assert outcome.cause.doing == f"computing {at}"


def test_before_and_after_are_outside_of_it(tmp_path: Path) -> None:
    for when in ("before", "after"):
        outcome = run(tmp_path, when=when, fault="raise")
        outcome.check(told_within_s=SOON_S)
        assert outcome.cause is not None
        assert "stage.py" not in outcome.cause.traceback
        assert "in train" in outcome.cause.traceback and "in infer" not in outcome.cause.traceback
        assert outcome.cause.doing == "computing 1F2"


@pytest.mark.parametrize(("when", "needed"), [("before", "2F2"), ("after", "2F3")])
def test_what_was_sent_before_the_end_still_arrives(when: str, needed: str, tmp_path: Path) -> None:
    """After 1F2 its output is with the transport: rank 2 misses the next one; before, that one."""
    outcome = run(tmp_path, when=when, fault="SIGKILL")
    outcome.check(told_within_s=SOON_S)
    assert outcome.survivors[2].doing == f"waiting for the input of {needed}"


def test_an_action_of_one_operation_has_its_fault_at_the_end(tmp_path: Path) -> None:
    text = SCRIPT.replace(
        "barepp.mlp(5, 8, 8, 3)", "[torch.nn.Flatten, torch.nn.Tanh, *[make] * 3]"
    )
    text = text.replace("    pipe =", "    make = lambda: torch.nn.Linear(8, 8)\n        pipe =")
    outcome = run(tmp_path, text, fault="SIGKILL", at="0F2", rank=0)
    outcome.check(told_within_s=SOON_S)


def test_a_fault_leaves_the_numbers_alone_until_it_happens(tmp_path: Path) -> None:
    text = SCRIPT + "        print('hash', pipe.parameters_sha256())\n"
    hashes = set()
    for when in ("before", "during", "after"):
        outcome = run(tmp_path, text, fault="delay:0", when=when, step=1)
        outcome.check()
        hashes |= {line.split()[-1] for line in outcome.output.splitlines() if "hash" in line}
    plain = run_job(tmp_path, text, 3)
    assert hashes == {plain.said(0)[-1].split()[-1]}


# -- scripts, functions, threads ------------------------------------------------------------------


def test_a_script_gets_its_arguments(tmp_path: Path) -> None:
    outcome = run(tmp_path, args=["--lr", 0.5])
    assert "[rank 0] step 0 ['--lr', '0.5']" in outcome.output


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_function_on_processes(transport: str) -> None:
    outcome = run_with_fault(
        train, world=3, rank=2, at="2B0", args=[2], transport=transport, fork=True, step=1
    )
    outcome.check(told_within_s=SOON_S)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_function_on_threads(when: str) -> None:
    with nothing_left():
        outcome = run_with_fault(
            train, world=3, rank=1, at="1B2", when=when, fault="raise", transport="inproc"
        )
    outcome.check(told_within_s=SOON_S)
    assert outcome.exit_code == 1
    assert all(survivor.told == outcome.cause for survivor in outcome.survivors.values())


def test_a_delay_on_threads() -> None:
    outcome = run_with_fault(
        train, world=2, rank=1, at="1B2", fault="delay:0.1", transport="inproc"
    )
    outcome.check()
    assert outcome.ended_after_s is not None and outcome.ended_after_s > 0.1


# -- who does not listen, what is left ------------------------------------------------------------


def test_a_survivor_that_is_busy_is_ended_after_the_grace(tmp_path: Path) -> None:
    text = """
        import barepp, time, torch

        class Slow(torch.nn.Linear):
            def forward(self, x):
                if self.calls == 2:
                    time.sleep(60)
                self.calls += 1
                return super().forward(x)

        def slow():
            layer = Slow(8, 8)
            layer.calls = 0
            return layer

        with barepp.init() as world:
            layers = [slow, lambda: torch.nn.Linear(8, 8)]
            pipe = barepp.Pipeline(
                world, layers, lambda x, _: x.mean(), schedule="gpipe", num_microbatches=4
            )
            pipe.step(torch.ones(8, 8), torch.ones(8))
    """
    outcome = run(tmp_path, text, world=2, rank=1, at="1F0", grace=0.2)
    outcome.check(ended_within_s=SOON_S)
    [survivor] = outcome.survivors.values()
    assert survivor.killed and survivor.told is None
    assert str(survivor) == "rank 0 did not end by itself while computing 0F2 and was killed"


def test_what_is_wrong_is_said() -> None:
    cause = Failure(1, "signal", "it was killed by SIGKILL", signal=9)
    well = FaultOutcome(
        fault=Fault(1, Action.parse("1F2")),
        happened=True,
        exit_code=137,
        cause=cause,
        survivors={0: Survivor(0, cause, "waiting for the input of 0B0", 0.1, 1, killed=False)},
        ended_after_s=0.2,
        seconds=1.0,
        leftovers=[],
        report="barepp: rank 1 failed",
        output="[rank 0] hello",
    )
    well.check(told_within_s=0.5, ended_within_s=0.5)
    survivor = well.survivors[0]
    killed = dataclasses.replace(survivor, told=None, killed=True)
    dataclasses.replace(well, survivors={0: killed}).check()

    other = dataclasses.replace(cause, rank=2)
    late = dataclasses.replace(survivor, after_s=0.7)
    wrong = {
        "it never happened": {"happened": False},
        "left behind: process: 7": {"leftovers": ["process: 7"]},
        "the exit code is 1 instead of 137": {"exit_code": 1},
        "the job went on for 0.700 s": {"ended_after_s": 0.7},
        "the job did not fail": {"cause": None},
        "the cause is said to be: rank 2 failed": {"cause": other},
        "(exit)": {"cause": dataclasses.replace(cause, cause="exit")},
        "lacks 'SIGKILL'": {"cause": dataclasses.replace(cause, message="it was killed")},
        "rank 0 was told another cause: rank 2": {
            "survivors": {0: dataclasses.replace(survivor, told=other)}
        },
        "rank 0 did not know what it was about": {
            "survivors": {0: dataclasses.replace(survivor, doing="")}
        },
        "too late: rank 0 raised JobFailed 700.0 ms after the fault": {"survivors": {0: late}},
        "rank 0 ended with exit code 3 without a JobFailed": {
            "survivors": {0: dataclasses.replace(survivor, told=None, exit_code=3)}
        },
        "rank 0 ended well": {
            "survivors": {0: dataclasses.replace(survivor, told=None, exit_code=0)}
        },
    }
    for words, change in wrong.items():
        with pytest.raises(AssertionError) as caught:
            dataclasses.replace(well, **change).check(told_within_s=0.5, ended_within_s=0.5)
        text = str(caught.value)
        assert words in text
        assert text.startswith("SIGKILL on rank 1 during 1F2 of step 0:\n")
        if change.get("happened", True):
            assert text.endswith("barepp: rank 1 failed\n[rank 0] hello")

    delayed = dataclasses.replace(well, fault=Fault(1, Action.parse("1F2"), what="delay:1"))
    with pytest.raises(AssertionError, match="the job failed: rank 1 failed: it was killed"):
        delayed.check()


def test_a_process_that_stays_is_found(tmp_path: Path) -> None:
    """It has a process group of its own, so that the launcher's last blow misses it."""
    text = SCRIPT.replace(
        "with barepp",
        "import subprocess; subprocess.Popen(['sleep', '100'], process_group=0)\n    with barepp",
    )
    outcome = run_with_fault(write_script(tmp_path, text), world=2, rank=1, at="1F2", fork=True)
    found = [left for left in outcome.leftovers if left.startswith("process: ")]
    assert len(found) == 2
    with pytest.raises(AssertionError, match=found[0]):
        outcome.check()
    for left in found:
        os.kill(int(left.split()[-1]), 9)


def test_a_step_that_never_comes(tmp_path: Path) -> None:
    outcome = run(tmp_path, step=3)
    assert not outcome.happened and outcome.exit_code == 0
    with pytest.raises(AssertionError, match="it never happened: the job ended with code 0"):
        outcome.check()


# -- wrong wishes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"rank": 3}, "rank 3 cannot fail: there are ranks 0 to 2"),
        ({"world": 0}, "a world has at least one rank, not 0"),
        ({"when": "while"}, "a fault happens before, during, after an action, not 'while'"),
        ({"step": -1}, "steps count from 0; there is no step -1"),
        ({"at": "F3"}, "'F3' is not an action"),
        ({"fault": "SIGCHLD"}, "there is no fault 'SIGCHLD'; these exist: SIGKILL"),
        ({"fault": "exit:256"}, "there is no fault 'exit:256'"),
        ({"fault": "raise:SystemExit"}, "there is no fault 'raise:SystemExit'"),
        ({"fault": "raise:UnicodeDecodeError"}, "there is no fault"),
        ({"fault": "raise:print"}, "there is no fault 'raise:print'"),
        ({"fault": "raise:"}, "there is no fault 'raise:'"),
        ({"fault": "delay:"}, "there is no fault 'delay:'"),
        ({"fault": "delay:."}, "there is no fault 'delay:.'"),
        ({"fault": "hang:1"}, "there is no fault 'hang:1'"),
        ({"transport": "inproc"}, "over inproc the ranks are threads of one process, and SIGKILL"),
        ({"transport": "inproc", "fault": "raise"}, "the ranks of a script are processes"),
        ({"target": "nowhere.py"}, "there is no script nowhere.py"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_at_once(wish: dict[str, object], sentence: str) -> None:
    wish = {"target": __file__, "world": 3, "rank": 1, "at": "1F2", **wish}
    began = time.monotonic()
    with pytest.raises(barepp.BareppError) as caught:
        run_with_fault(**wish)  # type: ignore[arg-type]
    assert sentence in str(caught.value)
    assert time.monotonic() - began < 1.0


def test_a_transport_that_does_not_exist() -> None:
    with pytest.raises(UnknownTransport):
        run_with_fault(__file__, world=2, rank=0, at="0F0", transport="pigeon")


def test_an_action_that_the_rank_does_not_have_is_told_with_those_that_it_has(
    tmp_path: Path,
) -> None:
    with pytest.raises(barepp.UsageError) as caught:
        run(tmp_path, at="1F4")
    assert str(caught.value) == (
        "rank 1 has no 1F4 in step 0, so no fault can happen at it; "
        "its actions are 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3"
    )


def test_every_signal_that_is_listed_exists_and_names_itself() -> None:
    for name in DEADLY:
        expected = fault_action(name).expected
        assert (expected.cause, expected.words) == ("signal", name)
        assert expected.exit_code == 128 + signal.Signals[name]
