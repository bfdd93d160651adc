"""`python -m barepp.timeline`: what it prints, how it refuses, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from traces import made

from barepp.plan.__main__ import main as plan
from barepp.timeline import main
from barepp.trace.chrome_format import to_events


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(to_events(made("1f1b", 2, 3, transfer=1, num_steps=3))))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("python -m barepp.timeline: ") and out.err.count("\n") == 1
    return out.err


def test_plan_and_reality_and_where_the_time_went(trace, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main([str(trace)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:11] == [
        "1f1b: 2 stages on 2 ranks, 3 microbatches",
        "",
        "planned, from what each action took: 12.00 ms, bubble 25.0%",
        "ms      0         5         10        15",
        "rank 0  F0F1....B0--F2B1--..B2--",
        "rank 1  ..F0B0--F1B1--F2B2--....",
        "",
        "measured, step 1: 16.00 ms, bubble 43.8%",
        "ms      0         5         10        15",
        "rank 0  F0F1........B0--F2B1--......B2--",
        "rank 1  ....F0B0--F1B1--....F2B2--......",
    ]
    text = "\n".join(lines).replace("\n" + " " * 16, " ")  # long lines are broken
    assert "F forward; B backward; the number is the microbatch; . idle" in text
    assert "milliseconds a step, the mean of 2:" in text
    assert "rank 0 waited   " in text and " for rank 1 (gradients)" in text
    assert "rank 1 waited   " in text and " for rank 0 (activations)" in text
    assert "25.0% predicted from what each action took" in text
    assert "own time " in text and "µs an action beside computing and waiting: " in text
    assert "messages        6 a step, on their way for 1000 µs in the mean" in text
    assert "between steps   0.50 ms optimizer" in text
    assert "\x1b" not in text
    assert "clocks" not in text  # one clock: nothing to tell


def test_a_step_can_be_chosen(trace, capsys):
    assert main([str(trace), "--step", "2"]) == 0
    assert "measured, step 2:" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"traceEvents": []}'])
def test_what_is_no_trace_is_one_sentence_and_code_2(content, tmp_path, capsys):
    path = tmp_path / "trace.json"
    path.write_text(content)
    assert str(path) in refused(capsys, path)


def test_wrong_usage_is_one_sentence_and_code_2(trace, tmp_path, capsys, monkeypatch):
    assert "cannot be read: No such file" in refused(capsys, tmp_path / "none.json")
    assert "has no step 7; there are: 0 to 2" in refused(capsys, trace, "--step", "7")
    assert "the following arguments are required: trace" in refused(capsys)
    assert "ends with .svg or .png" in refused(capsys, trace, "--plot", tmp_path / "out.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(capsys, trace, "--plot", tmp_path / "out.svg")


def test_plan_refuses_in_the_same_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--schedule", "gpipe", "--stages", "2", "--microbatches", "2", "--plot"]
    with pytest.raises(SystemExit) as caught:
        plan([*arguments, str(tmp_path / "out.svg")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("not installed: pip install matplotlib\n")


def test_both_commands_draw_in_one_style(trace, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    real, planned = tmp_path / "real.svg", tmp_path / "plan.svg"
    assert main([str(trace), "--plot", str(real), "--arrows"]) == 0
    arguments = ["--schedule", "1f1b", "--stages", "2", "--microbatches", "3"]
    assert plan([*arguments, "--plot", str(planned)]) == 0
    assert main([str(trace), "--plot"]) == 0
    beside = trace.with_suffix(".svg")
    assert capsys.readouterr().out.endswith(f"picture         {beside}\n")
    for path in (real, planned, beside):
        assert "1f1b: 2 stages on 2 ranks, 3 microbatches" in path.read_text()
        assert "#56b4e9" in path.read_text() and "#e69f00" in path.read_text()


def test_neither_torch_nor_matplotlib_is_needed(trace):
    code = (
        "import sys; from barepp.timeline import main; main(sys.argv[1:]); "
        "print([n for n in ('torch', 'numpy', 'matplotlib', 'transport') if n in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_as_a_command_with_a_reader_that_goes_away(trace):
    command = f"{sys.executable} -m barepp.timeline {trace} | true"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 141) and done.stderr == ""
