"""The course: each demo does what its docstring says, and all of them learn the same net."""

import ast
import contextlib
import gzip
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import monolith as monolith_demo
import pytest
import rendezvous
import torch
import training
from jobs import ROOT, run_script
from traces import check_format

import barepp
import transport
from barepp import LayerCost, balance, make_schedule
from barepp.plan.__main__ import main as plan
from barepp.plan.simulate import Costs, simulate
from barepp.timeline import main as show
from barepp.trace.chrome_reader import read_trace
from transport.sockets.handshake import HELLO, NONCE_NBYTES, PROOF_NBYTES

DEMOS = ROOT / "demos"
PIPELINES = {
    "naive": "naive",
    "gpipe": "gpipe",
    "one_f_one_b": "1f1b",
    "interleaved": "interleaved_1f1b",
    "zero_bubble": "zb_h1",
    "zero_bubble_v": "zb_v",
}
COURSE = [
    *("monolith", "manual_split", "ping_pong", "rendezvous", "by_hand"),
    *(*PIPELINES, "balance", "gpt", "kill_a_worker"),
]
BF16 = ["--steps", "1", "--autocast", "bf16"]
ODD = ["--steps", "3", "--batch", "21", "--microbatches", "4"]  # 6, 5, 5, 5 rows
KEYS = {
    "schedule",
    "world_size",
    "stages",
    "partition",
    "microbatches",
    "steps",
    "losses",
    "test_accuracy",
    "parameters_sha256",
    "step_ms",
    "bubble_measured",
    "bubble_predicted",
    "peak_in_flight",
    "same_bits",
}


def python(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def launch(world_size: int, demo: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m barepp.launch --world N DEMO FLAGS…`, but the ranks are forked from here."""
    with tempfile.TemporaryDirectory() as folder:
        finished = run_script(Path(folder), ROOT / demo, list(map(str, flags)), world_size)
    return subprocess.CompletedProcess([demo], finished.code, finished.out, finished.err)


def as_the_manual_says(demo: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the docstring's command, with more flags, on forked ranks."""
    module, name, world, number, script, *more = the_command(demo)
    assert (module, name, world) == ("-m", "barepp.launch", "--world")
    return launch(int(number), script, *more, *flags)


@pytest.fixture
def alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a demo in this process, as `python demos/NAME.py` does but without a process's start.

    Returns the exit code, and what went to stdout and stderr.
    """

    def run(demo: str, *flags: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"demos/{demo}.py", *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(DEMOS / f"{demo}.py"), run_name="__main__")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        return code, *capsys.readouterr()

    return run


def docstring(demo: str) -> str:
    return (DEMOS / f"{demo}.py").read_text().split('"""')[1]


def the_command(demo: str) -> list[str]:
    """Return the arguments of the docstring's first command, without the leading `python`."""
    [command, *_] = re.findall(r"^    python (.*)$", docstring(demo), re.MULTILINE)
    return command.split()


def promised_lines(demo: str) -> list[str]:
    """Return the lines that the docstring says the demo ends with."""
    text = docstring(demo)
    return text[text.index("ends with") :].split("\n\n")[1].splitlines()


def as_pattern(line: str) -> re.Pattern[str]:
    """Match a line of the docstring up to its "…"; a measured number may be another one."""
    start = line.strip().split("…")[0].strip()
    return re.compile(re.sub(r"\d+\\.\d+", r"\\d+\\.\\d+", re.escape(start)))


def assert_keeps_its_promise(demo: str, output: str) -> None:
    for line in promised_lines(demo):
        assert as_pattern(line).search(output), f"{demo}: no line {line.strip()!r} in:\n{output}"


def results(path: Path) -> dict:
    found = json.loads(path.read_text())
    assert found.keys() >= KEYS
    assert len(found["losses"]) == found["steps"]
    assert len(found["peak_in_flight"]) == found["world_size"]
    assert found["step_ms"] > 0
    return found


# -- the main promise -----------------------------------------------------------------------------


def test_four_processes_learn_the_digits(tmp_path: Path) -> None:
    path = tmp_path / "gpipe.json"
    run = python(*the_command("gpipe"), "--json", path)
    assert (run.returncode, run.stderr) == (0, "")
    assert_keeps_its_promise("gpipe", run.stdout)
    assert len(run.stdout.splitlines()) == 14
    found = results(path)
    assert found["same_bits"] is True
    assert found["test_accuracy"] >= 0.95
    assert found["bubble_predicted"] == pytest.approx(3 / 11)
    assert found["bubble_predicted"] < found["bubble_measured"] < 1
    assert found["peak_in_flight"] == [8, 8, 8, 8]


# -- the course, in order -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def monolith(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("monolith") / "results.json"
    assert the_command("monolith") == ["demos/monolith.py"]
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(sys, "argv", ["demos/monolith.py", *ODD, "--json", str(path)])
        runpy.run_path(str(DEMOS / "monolith.py"), run_name="__main__")
    assert_keeps_its_promise("monolith", shown.getvalue())
    return results(path)


def test_the_monolith_is_the_pipeline_of_one_process(monolith: dict) -> None:
    assert monolith["schedule"] == "monolith"
    assert monolith["bubble_predicted"] == monolith["bubble_measured"] == 0
    assert monolith["peak_in_flight"] == [1]
    assert monolith["computing_ms"][0] > 0 and monolith["waiting_ms"] == [0]


def test_the_monoliths_trace_is_drawn_like_any_other(tmp_path: Path, alone: Callable) -> None:
    trace = tmp_path / "trace.json"
    assert alone("monolith", *ODD, "--trace", trace)[0] == 0
    [recorded] = read_trace(trace).ranks
    once = [f"0{kind}{microbatch}" for microbatch in range(4) for kind in "FB"]
    assert [str(span.action) for span in recorded.actions] == 3 * once
    assert [note.name for note in recorded.notes] == 3 * ["optimizer"]
    assert show([str(trace)]) == 0


def test_manual_split(alone: Callable) -> None:
    assert the_command("manual_split") == ["demos/manual_split.py"]
    code, shown, told = alone("manual_split")
    assert (code, told) == (0, "")
    assert shown.endswith("34 of 34 gradients are those of the whole net, bit for bit\n")
    assert_keeps_its_promise("manual_split", shown)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ping_pong(world_size: int) -> None:
    assert the_command("ping_pong")[3:] == ["2", "demos/ping_pong.py"]
    run = launch(world_size, "demos/ping_pong.py")
    assert (run.returncode, run.stderr) == (0, "")
    assert_keeps_its_promise("ping_pong", run.stdout)


def test_ping_pong_alone_says_what_it_needs(alone: Callable) -> None:
    sentence = "ping-pong needs two players: python -m barepp.launch --world 2 demos/ping_pong.py"
    assert alone("ping_pong") == (0, sentence + "\n", "")


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("demo", PIPELINES)
def test_a_pipeline_learns_what_the_monolith_learns(
    demo: str, world_size: int, monolith: dict, tmp_path: Path, alone: Callable
) -> None:
    path, trace = tmp_path / "results.json", tmp_path / "trace.json"
    flags = [*ODD, "--json", path, "--trace", trace]
    if world_size == 1:
        assert alone(demo, *flags)[0] == 0
    else:
        run = as_the_manual_says(demo, *flags)
        assert run.returncode == 0, run.stderr
        assert "[rank 1]" not in run.stdout  # one rank speaks for all
    found = results(path)
    assert found["same_bits"] is True
    for key in ("losses", "parameters_sha256", "test_accuracy", "steps", "microbatches"):
        assert found[key] == monolith[key], key
    assert found["schedule"] == PIPELINES[demo]
    assert found["world_size"] == world_size
    stages = world_size * (2 if demo in ("interleaved", "zero_bubble_v") else 1)
    assert found["stages"] == stages
    order = make_schedule(PIPELINES[demo], stages, 4, world_size).order
    assert found["peak_in_flight"] == simulate(order, stages, Costs()).peak_in_flight
    check_format(json.loads(trace.read_text()))
    traced = read_trace(trace)
    for rank, recorded in enumerate(traced.ranks):
        actions = [span.action for span in recorded.actions]
        assert actions == 3 * list(order[rank])  # one for one, in this order
        assert [note.name for note in recorded.notes if note.step is None] == 3 * [
            "optimizer (Adam)"
        ]
    assert traced.clock_error_ns == [0] * world_size  # of one host
    assert show([str(trace)]) == 0


@pytest.mark.parametrize("demo", PIPELINES)
def test_a_pipeline_prints_what_its_manual_says(demo: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run = as_the_manual_says(demo, "--steps", "2", "--json", path)
    assert (run.returncode, run.stderr) == (0, "")
    assert_keeps_its_promise(demo, run.stdout)
    found = results(path)
    assert f"    bubble          {found['bubble_predicted']:.1%} predicted" in docstring(demo)
    assert "microbatch " not in run.stdout and "computing" not in run.stdout


def test_the_table_of_times_is_told_to_who_asks(alone: Callable) -> None:
    assert "computing" not in alone("gpipe", *ODD)[1]
    code, shown, _ = alone("gpipe", *ODD, "--verbose")
    assert code == 0
    assert "rank   peak in-flight   peak memory   computing" in shown
    assert re.search(r"own time +\d+ µs an action", shown)


def test_other_bits_would_be_noticed(alone: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(num_steps: int, flags: training.Flags) -> str:
        return parameters_after(num_steps - 1, flags)

    parameters_after = monolith_demo.parameters_after
    assert "the same bits as one process: yes" in alone("gpipe", *ODD)[1]
    monkeypatch.setattr(monolith_demo, "parameters_after", wrong)
    assert "the same bits as one process: NO" in alone("gpipe", *ODD)[1]
    assert "the same bits as one process: not compared" in alone("gpipe", *BF16)[1]


def test_stages_and_recompute_are_flags(monolith: dict, tmp_path: Path, alone: Callable) -> None:
    path = tmp_path / "results.json"
    flags = ["--stages", "3", "--recompute", "all_but_last", "--json", path]
    assert alone("interleaved", *ODD, *flags)[0] == 0
    found = results(path)
    assert found["parameters_sha256"] == monolith["parameters_sha256"]
    assert (found["world_size"], found["stages"]) == (1, 3)


def test_a_device_is_a_flag_of_a_demo_alone(
    monolith: dict, tmp_path: Path, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "results.json"
    assert alone("gpipe", *ODD, "--device", "auto", "--json", path)[0] == 0
    assert results(path)["parameters_sha256"] == monolith["parameters_sha256"]
    code, _, told = alone("gpipe", *ODD, "--device", "cuda")
    assert code == 2 and told.startswith("gpipe.py: device cuda was asked for, but rank 0 finds no")
    sentence = "gpipe.py: there is no device 'tpu'; these exist: cpu, cuda, auto\n"
    assert alone("gpipe", *ODD, "--device", "tpu") == (2, "", sentence)
    assert "--device WORD" in alone("gpipe", "--help")[1]


def test_a_launchers_device_is_for_all_ranks() -> None:
    run = launch(2, "demos/gpipe.py", *ODD, "--device", "auto")
    assert run.returncode == 2
    assert "was started with device cpu, not auto: tell the launcher" in run.stderr


def test_half_precision_is_a_flag(monolith: dict, tmp_path: Path, alone: Callable) -> None:
    found = {}
    for autocast in ("off", "bf16", "fp16"):
        path = tmp_path / f"{autocast}.json"
        assert alone("gpipe", *ODD, "--autocast", autocast, "--json", path)[0] == 0
        found[autocast] = results(path)["parameters_sha256"]
    assert found["off"] == monolith["parameters_sha256"]
    assert len(set(found.values())) == 3
    path = tmp_path / "two.json"
    assert launch(2, "demos/gpipe.py", *ODD, "--autocast", "fp16", "--json", path).returncode == 0
    assert results(path)["parameters_sha256"] == found["fp16"]


@pytest.mark.parametrize("partition", ["balanced", "6,5,6"])
def test_a_partition_is_a_flag(
    partition: str, monolith: dict, tmp_path: Path, alone: Callable
) -> None:
    path = tmp_path / "results.json"
    assert monolith["partition"] == [17]
    flags = ["--stages", "3", "--partition", partition, "--json", path]
    assert alone("interleaved", *ODD, *flags)[0] == 0
    found = results(path)
    assert found["parameters_sha256"] == monolith["parameters_sha256"]
    assert len(found["partition"]) == 3 and sum(found["partition"]) == 17
    assert partition == "balanced" or found["partition"] == [6, 5, 6]


def test_four_processes_cut_where_the_first_one_says(monolith: dict, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run = as_the_manual_says("one_f_one_b", *ODD, "--partition", "balanced", "--json", path)
    assert run.returncode == 0, run.stderr
    found = results(path)
    assert found["parameters_sha256"] == monolith["parameters_sha256"]
    assert len(found["partition"]) == 4 and sum(found["partition"]) == 17


def test_balance(tmp_path: Path) -> None:
    path, trace = tmp_path / "results.json", tmp_path / "trace.json"
    sizes = ["--steps", "12", "--hidden", "128", "--microbatches", "8"]
    run = as_the_manual_says("balance", *sizes, "--json", path, "--trace", trace)
    assert run.returncode == 0, run.stderr
    assert_keeps_its_promise("balance", run.stdout)
    found = json.loads(path.read_text())
    uniform, balanced = found["partitions"]
    assert len(found["layers"]) == 17
    assert uniform["partition"] == [9, 8]
    assert sum(balanced["partition"]) == 17
    assert uniform["parameters_sha256"] == balanced["parameters_sha256"]
    # Measured times move, in the midst too: the cut is the best one for what was measured.
    costs = [LayerCost(**layer) for layer in found["layers"]]
    assert max(costs, key=lambda cost: cost.forward_s) is costs[2]
    assert balanced["partition"] == balance(costs, make_schedule("1f1b", 2, 8))
    assert min(uniform["predicted_ms"], balanced["predicted_ms"]) > 0
    assert min(uniform["step_ms"], balanced["step_ms"]) > 0
    for rank in read_trace(trace).ranks:  # of the balanced one alone
        assert [step.number for step in rank.steps] == list(range(12))
        assert [note.name for note in rank.notes if note.step is None] == 12 * ["optimizer (Adam)"]


def test_kill_a_worker(alone: Callable) -> None:
    assert the_command("kill_a_worker") == ["demos/kill_a_worker.py"]
    code, shown, told = alone("kill_a_worker")
    assert (code, told) == (0, "")
    assert_keeps_its_promise("kill_a_worker", shown)
    assert shown.startswith("barepp: rank 2 failed: it was killed by SIGKILL")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--at", "2X3"], "'2X3' is not an action"),
        (["--rank", "4"], "rank 4 cannot fail: there are ranks 0 to 3"),
        (["--fault", "SIGFOO"], "there is no fault 'SIGFOO'; these exist: SIGKILL"),
    ],
)
def test_kill_a_worker_refuses_in_one_sentence(
    flags: list[str], sentence: str, alone: Callable
) -> None:
    code, out, err = alone("kill_a_worker", *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"kill_a_worker.py: {sentence}") and err.count("\n") == 1


@pytest.mark.parametrize("demo", COURSE)
def test_the_manual_is_complete(demo: str) -> None:
    assert f"demos/{demo}.py" in the_command(demo)
    assert promised_lines(demo)
    assert "\n\nYou can now say: " in docstring(demo)


@pytest.mark.parametrize("demo", PIPELINES)
def test_the_picture_in_the_manual_is_what_plan_draws(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    [arguments] = re.findall(r"`python -m barepp\.plan (.*)`", docstring(demo))
    assert plan(arguments.split()) == 0
    drawn = capsys.readouterr().out.split("\n\n")[1]
    indented = "\n".join("    " + line for line in drawn.splitlines())
    assert indented in docstring(demo)


# -- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b"])
def test_loops_by_hand_learn_what_the_monolith_learns(schedule: str, monolith: dict) -> None:
    """Their lists are those that the schedules' own files make."""
    run = launch(4, "demos/by_hand.py", *ODD, "--schedule", schedule, "--print")
    assert (run.returncode, run.stderr) == (0, "")
    assert f"after 3 steps; parameters sha256 {monolith['parameters_sha256']}" in run.stdout
    order = make_schedule(schedule, 4, 4).order
    for rank, actions in enumerate(order):
        listed = " ".join(map(str, actions))
        line = f"[rank {rank}] {listed}  (the same list as barepp.make_schedule)\n"
        assert line in run.stdout


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b"])
def test_loops_by_hand_on_any_number_of_ranks(
    schedule: str, world_size: int, monolith: dict
) -> None:
    """Also with fewer microbatches than ranks, and when sends wait, where no circle can be."""
    waits = ["--sends", "wait"] if schedule != "1f1b" else []
    flags = [*ODD, "--schedule", schedule, *waits]
    run = launch(world_size, "demos/by_hand.py", *flags)
    assert (run.returncode, run.stderr) == (0, "")
    assert monolith["parameters_sha256"] in run.stdout
    run = launch(world_size, "demos/by_hand.py", *flags, "--microbatches", "2", "--print")
    assert run.returncode == 0 and run.stdout.count("(the same list as") == world_size


def test_by_hand_as_its_manual_says() -> None:
    run = as_the_manual_says("by_hand", "--steps", "2")
    promise = docstring("by_hand").split("ends with\n\n")[1].splitlines()[0].strip()
    shown = re.compile(as_pattern(promise).pattern.replace("460", "2"))
    assert run.returncode == 0 and shown.search(run.stdout), run.stdout


def test_sends_that_wait_end_in_a_deadlock_that_is_proven() -> None:
    began = time.monotonic()
    run = launch(4, "demos/by_hand.py", *ODD, "--schedule", "1f1b", "--sends", "wait")
    assert time.monotonic() - began < 20
    assert run.returncode == 124
    assert run.stderr.startswith("barepp: the job failed: a deadlock: every rank waits, and no ")
    assert "rank 2 waits for rank 3" in run.stderr and "rank 3 waits for rank 2" in run.stderr
    assert "in one_f_one_b" in run.stderr  # of the stacks


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--schedule", "zb_v"], "--schedule is one of naive, gpipe, 1f1b"),
        (["--sends", "never"], "--sends is one of start, wait"),
        (["--json", "x"], "unrecognized arguments: --json x"),
    ],
)
def test_by_hand_refuses_in_one_sentence(flags: list[str], sentence: str, alone: Callable) -> None:
    assert alone("by_hand", *flags) == (2, "", f"by_hand.py: {sentence}\n")


# -- the conversation of the rendezvous ------------------------------------------------------------


def test_the_ranks_conversation_is_the_real_one(alone: Callable) -> None:
    assert rendezvous.HELLO.format == HELLO.format
    sizes = [HELLO.size, NONCE_NBYTES + PROOF_NBYTES, PROOF_NBYTES, 1]
    assert [size for _, _, size in rendezvous.HANDSHAKE] == sizes
    assert the_command("rendezvous") == ["demos/rendezvous.py"]
    code, shown, told = alone("rendezvous")
    assert (code, told) == (0, "")
    assert_keeps_its_promise("rendezvous", shown)
    assert shown.startswith("a stranger  -> rendezvous  64 zero bytes; the answer: it hangs up")
    for rank in (1, 2):
        said = re.findall(rf"^rank {rank} +-> rendezvous +(\w+)", shown, re.MULTILINE)
        heard = re.findall(rf"^rendezvous +-> rank {rank} +(\w+)", shown, re.MULTILINE)
        assert said == ["hello", "proof", "join", "barrier", "barrier", "goodbye", "end"]
        answers = ["challenge", "verdict", "attached", "world", "release", "release", "end"]
        assert heard == answers
        assert f"want to be rank {rank} of job" in shown
    book = re.search(r"the address book: (.*)", shown)
    assert book is not None and re.findall(r"rank (\d) at barepp-", book[1]) == ["0", "1", "2"]
    assert "join       world_size 3, address barepp-" in shown


def test_a_rank_that_cannot_begin_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "rank", lambda *_: os._exit(3))
    with pytest.raises(SystemExit, match="rank 0 has ended, so nobody serves the rendezvous"):
        rendezvous.main()


# -- what demos may use ----------------------------------------------------------------------------


@pytest.mark.parametrize("demo", sorted(DEMOS.glob("*.py")), ids=lambda path: path.stem)
def test_a_demo_uses_public_names_only(demo: Path) -> None:
    """So does a script of a reader's own: nothing of barepp.<room>.… or transport.<room>.…"""
    tree = ast.parse(demo.read_text())
    own = {path.stem for path in DEMOS.glob("*.py")}
    packages = {"barepp": barepp, "transport": transport}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
            if modules[0] in packages:
                assert {alias.name for alias in node.names} <= {*packages[modules[0]].__all__}
            if modules == ["barepp.testing"]:
                assert {alias.name for alias in node.names} <= {*barepp.testing.__all__}
        else:
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in packages
            ):
                assert node.attr in packages[node.value.id].__all__, ast.unparse(node)
            continue
        for module in modules:
            top = module.partition(".")[0]
            public = module in ("barepp", "barepp.testing", "transport")
            assert public or top == "torch" or top in own or top in sys.stdlib_module_names, module


# -- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--microbatches", "0"], "--microbatches is 0; it must be at least 1"),
        (["--steps", "-3"], "--steps is -3; it must be at least 1"),
        (["--lr", "nan"], "--lr is nan; it must be a positive number"),
        (["--hidden", "wide"], "argument --hidden: invalid int value: 'wide'"),
        (["--json", "nowhere/x"], "--json nowhere/x cannot be written: No such file or directory"),
        (["--stages", "-1"], "--stages is -1; it must be at least 0"),
        (
            ["--stages", "2"],
            "gpipe keeps exactly one stage on each rank: 2 stages need 2 ranks, not 1",
        ),
        (
            ["--recompute", "some"],
            "unknown recompute 'some'; there is: off, all, all_but_last",
        ),
        (["--autocast", "fp8"], "--autocast is off, bf16 or fp16, not fp8"),
        (
            ["--partition", "5,x"],
            "--partition is uniform, balanced, or a number of layers for each stage, not 5,x",
        ),
        (
            ["--partition", "even"],
            "unknown partition 'even'; there is: uniform, balanced, or a list with the number of "
            "layers of each stage",
        ),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_input_gets_one_sentence(flags: list[str], sentence: str, alone: Callable) -> None:
    assert alone("gpipe", *flags) == (2, "", f"gpipe.py: {sentence}\n")


@pytest.mark.parametrize("demo", ["monolith", "balance"])
@pytest.mark.parametrize("flag", ["stages", "partition", "recompute", "autocast"])
def test_a_flag_that_would_change_nothing_is_not_there(
    demo: str, flag: str, alone: Callable
) -> None:
    sentence = f"{demo}.py: unrecognized arguments: --{flag} 2\n"
    assert alone(demo, f"--{flag}", "2") == (2, "", sentence)
    code, shown, _ = alone(demo, "--help")
    assert code == 0 and f"--{flag} " not in shown and "--microbatches N" in shown


def test_wrong_input_to_four_ranks_gets_one_sentence() -> None:
    run = launch(4, "demos/gpipe.py", "--layers", "2")
    sentence = "2 layers and the head are 3 to share, too few for 4 ranks: 2 layers allow 3 ranks"
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("barepp: ranks 0-3 failed: ")
    assert sentence in run.stderr
    assert run.stderr.endswith(")\n")  # and where: (demos/training.py, line ...)
    assert run.stderr.count("\n") == 1


def test_a_result_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    run = launch(2, "demos/gpipe.py", "--json", tmp_path)
    assert run.returncode == 2
    assert f"--json {tmp_path} cannot be written: Is a directory" in run.stderr
    assert run.stdout == ""


def test_a_path_is_tried_and_left_as_it_was(tmp_path: Path, alone: Callable) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("mine")
    for path in (old, new):
        code, _, error = alone("gpipe", "--json", path, "--trace", tmp_path)
        assert code == 2
        assert error == f"gpipe.py: --trace {tmp_path} cannot be written: Is a directory\n"
    assert old.read_text() == "mine"
    assert not new.exists()


def test_the_monolith_declines_to_be_many() -> None:
    run = launch(2, "demos/monolith.py")
    assert run.returncode == 2
    assert "this demo is one process by itself: python demos/monolith.py" in run.stderr


def test_damaged_data_gets_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(DEMOS, tmp_path / "demos", ignore=shutil.ignore_patterns("__pycache__"))
    data = tmp_path / "demos" / "data" / "digits.csv.gz"
    data.write_bytes(gzip.compress(gzip.decompress(data.read_bytes())[:5000]))
    run = python(tmp_path / "demos" / "gpipe.py")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"gpipe.py: {data}")
    assert run.stderr.count("\n") == 1


def test_help_is_the_manual_and_is_told_once() -> None:
    run = launch(2, "demos/one_f_one_b.py", "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("Step 9 of the course") == 1
    assert "--microbatches N" in run.stdout
