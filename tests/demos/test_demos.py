"""The course: each demo does what its docstring says, and all of them learn the same net."""

import gzip
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import ROOT
from traces import check_format

from barepp import LayerCost, balance, make_schedule
from barepp.plan.__main__ import main as plan
from barepp.plan.simulate import Costs, simulate
from barepp.timeline import main as show
from barepp.trace.chrome_reader import read_trace

DEMOS = ROOT / "demos"
PIPELINES = {
    "naive": "naive",
    "gpipe": "gpipe",
    "one_f_one_b": "1f1b",
    "interleaved": "interleaved_1f1b",
    "zero_bubble": "zb_h1",
    "zero_bubble_v": "zb_v",
}
COURSE = ["monolith", "manual_split", "ping_pong", *PIPELINES, "balance", "kill_a_worker"]
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


def launch(world_size: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "barepp.launch", "--world", str(world_size), *arguments)


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
    assert run.returncode == 0, run.stderr
    assert_keeps_its_promise("gpipe", run.stdout)
    found = results(path)
    assert found["test_accuracy"] >= 0.95
    assert found["bubble_predicted"] == pytest.approx(3 / 11)
    assert found["bubble_predicted"] < found["bubble_measured"] < 1
    assert found["peak_in_flight"] == [8, 8, 8, 8]


# -- the course, in order -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def monolith(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("monolith") / "results.json"
    run = python(*the_command("monolith"), *ODD, "--json", path)
    assert run.returncode == 0, run.stderr
    assert_keeps_its_promise("monolith", run.stdout)
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


def test_manual_split() -> None:
    run = python(*the_command("manual_split"))
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith("34 of 34 gradients are those of the whole net, bit for bit\n")
    assert_keeps_its_promise("manual_split", run.stdout)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ping_pong(world_size: int) -> None:
    command = [str(world_size) if word == "2" else word for word in the_command("ping_pong")]
    run = python(*command)
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
        run = python(*the_command(demo), *flags)
        assert run.returncode == 0, run.stderr
        assert "[rank 1]" not in run.stdout  # one rank speaks for all
    found = results(path)
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
    run = python(*the_command("one_f_one_b"), *ODD, "--partition", "balanced", "--json", path)
    assert run.returncode == 0, run.stderr
    found = results(path)
    assert found["parameters_sha256"] == monolith["parameters_sha256"]
    assert len(found["partition"]) == 4 and sum(found["partition"]) == 17


def test_balance(tmp_path: Path) -> None:
    path, trace = tmp_path / "results.json", tmp_path / "trace.json"
    sizes = ["--steps", "12", "--hidden", "128", "--microbatches", "8"]
    run = python(*the_command("balance"), *sizes, "--json", path, "--trace", trace)
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


def test_kill_a_worker() -> None:
    run = python(*the_command("kill_a_worker"))
    assert (run.returncode, run.stderr) == (0, "")
    assert_keeps_its_promise("kill_a_worker", run.stdout)
    assert run.stdout.startswith("barepp: rank 2 failed: it was killed by SIGKILL")


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
    assert the_command(demo)[-1] == f"demos/{demo}.py"
    assert promised_lines(demo)


@pytest.mark.parametrize("demo", PIPELINES)
def test_the_picture_in_the_manual_is_what_plan_draws(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    [arguments] = re.findall(r"`python -m barepp\.plan (.*)`", docstring(demo))
    assert plan(arguments.split()) == 0
    drawn = capsys.readouterr().out.split("\n\n")[1]
    indented = "\n".join("    " + line for line in drawn.splitlines())
    assert indented in docstring(demo)


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
    assert run.stdout.count("Step 7 of the course") == 1
    assert "--microbatches N" in run.stdout
