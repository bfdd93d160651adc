"""The transformer demo: the same bits and the same text however it is cut, and it does learn."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import gpt
import gpt_model
import pytest
import torch
from test_demos import alone, as_pattern, launch, promised_lines, the_command

from barepp.trace.chrome_reader import read_trace

__all__ = ["alone"]  # (a fixture)

SMALL = ["--blocks", "4", "--width", "16", "--heads", "2", "--context", "12", "--write", "9"]
ODD = ["--steps", "3", "--batch", "5", "--microbatches", "3"]  # 2, 2, 1 rows


CUT = ["--schedule", "zb_v", "--partition", "balanced"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(32, 127)) * 40)
    return path


def test_four_ranks_write_what_one_process_writes(
    text: Path, tmp_path: Path, alone: Callable
) -> None:
    flags = [*SMALL, *ODD, "--text", text, "--json"]
    code, shown, _ = alone("gpt", *flags, tmp_path / "one.json")
    assert code == 0
    path = tmp_path / "trace.json"
    run = launch(4, "demos/gpt.py", *flags, tmp_path / "four.json", *CUT, "--trace", path)
    assert run.returncode == 0, run.stderr
    one, four = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "four"))
    for key in ("losses", "held_out", "parameters_sha256", "written", "steps", "microbatches"):
        assert one[key] == four[key], key
    assert (four["world_size"], four["stages"], four["schedule"]) == (4, 8, "zb_v")
    assert len(four["partition"]) == 8 and sum(four["partition"]) == 10
    assert len(four["peak_in_flight"]) == 4
    assert four["written"].startswith("def ") and len(four["losses"]) == 3
    # By the clock on the wall, with the optimizer: a step's own time is a part of that.
    within = [step.end - step.start for step in read_trace(path).ranks[0].steps]
    assert len(within) == 3
    assert 0 < four["tokens_per_s"] < 2 * 5 * 12 / sum(within[1:]) * 1e9
    for line in promised_lines("gpt"):
        start = as_pattern(line.split("3.")[0])  # how much it learns depends on the flags
        assert start.search(shown) and start.search(run.stdout)


def test_it_learns(text: Path, tmp_path: Path, alone: Callable) -> None:
    path = tmp_path / "results.json"
    flags = ["--steps", "40", "--batch", "16", "--microbatches", "2", "--lr", "0.01"]
    assert alone("gpt", *SMALL, *flags, "--text", text, "--json", path)[0] == 0
    found = json.loads(path.read_text())
    assert found["losses"][0] == pytest.approx(math.log2(256), abs=0.3)  # it knows nothing
    assert found["held_out"] < 5.9  # which bytes there are would leave 6.6: it knows the order


def test_no_place_sees_what_comes_behind_it() -> None:
    size = gpt.Flags(blocks=2, width=16, heads=2, context=8)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(build() for build in gpt_model.gpt(size))).eval()
    text = torch.arange(8).reshape(1, 8)
    changed = text.clone()
    changed[0, 5] = 200
    with torch.no_grad():
        same = (model(text) == model(changed)).all(-1)[0]  # [8]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_the_text_is_the_standard_library_or_a_file(text: Path) -> None:
    assert b"import " in bytes(gpt.read_text(None).tolist())
    assert bytes(gpt.read_text(text).tolist()) == text.read_bytes()


def test_excerpts_are_followed_by_what_follows_them(text: Path) -> None:
    whole = gpt.read_text(text)
    seen, following = gpt.excerpts(whole, rows=7, context=6, seed=1)
    assert seen.shape == following.shape == (7, 6)
    assert torch.equal(seen[:, 1:], following[:, :-1])
    assert torch.equal(seen, gpt.excerpts(whole, rows=7, context=6, seed=1)[0])
    assert not torch.equal(seen, gpt.excerpts(whole, rows=7, context=6, seed=2)[0])
    shortest, behind = gpt.excerpts(whole[:7], rows=3, context=6, seed=0)  # there is one only
    assert torch.equal(shortest[0], whole[:6].long()) and torch.equal(behind[0], whole[1:7].long())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--heads", "3"], "--width 128 does not divide into 3 heads"),
        (["--context", "3"], "--context is 3; it must be at least 4"),
        (["--dropout", "1.0"], "--dropout is 1.0; it must be from 0 to below 1"),
        (["--text", "nowhere"], "--text nowhere cannot be read: No such file or directory"),
        (["--lr", "-1"], "--lr is -1.0; it must be a positive number"),
        (["--schedule", "fast"], "no schedule is called 'fast'"),
    ],
)
def test_wrong_input_gets_one_sentence(flags: list[str], sentence: str, alone: Callable) -> None:
    code, _, error = alone("gpt", *flags)
    assert code == 2
    assert error.startswith(f"gpt.py: {sentence}") and error.count("\n") == 1


def test_a_text_that_is_too_short(tmp_path: Path, alone: Callable) -> None:
    (tmp_path / "short").write_text("def f(): pass\n")
    sentence = "the text has 14 bytes; a context of 128 needs 258"
    assert alone("gpt", "--text", tmp_path / "short") == (2, "", f"gpt.py: {sentence}\n")


def test_the_learning_rate_rises_then_falls() -> None:
    for steps in (1, 2, 9, 100):
        flags = gpt.Flags(steps=steps)
        # One more than there are steps: torch's schedulers ask for the next one after each.
        rates = [gpt.part_of_rate(step, flags) for step in range(steps + 1)]
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert min(rates) > 0 and max(rates) == 1


def test_the_command_is_the_manuals() -> None:
    assert the_command("gpt") == ["-m", "barepp.launch", "--world", "4", "demos/gpt.py"]
