"""A schedule from a user's own file: run like any other, and explained when it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import barepp
from barepp.errors import ScheduleError
from barepp.plan.__main__ import main as plan
from barepp.schedules import make_schedule

GPIPE = """
from barepp.program.actions import Action, Kind

def objects(num_stages, num_microbatches, num_ranks):
    for stage in range(num_stages):
        yield [Action(stage, k, b) for k in (Kind.F, Kind.B) for b in range(num_microbatches)]

def texts(num_stages, num_microbatches, num_ranks):
    return [[str(action) for action in row] for row in objects(num_stages, num_microbatches, 0)]

def lines(num_stages, num_microbatches, num_ranks):
    return tuple(" ".join(row) for row in texts(num_stages, num_microbatches, num_ranks))
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def refusal(folder: Path, rows: object, stages: int = 2, microbatches: int = 2) -> str:
    """Return why a function that gives `rows` is refused."""
    file = written(folder, f"def wrong(s, m, r):\n    return {rows!r}\n")
    with pytest.raises(ScheduleError) as caught:
        make_schedule(f"{file}:wrong", stages, microbatches)
    return str(caught.value)


@pytest.mark.parametrize("function", ["objects", "texts", "lines"])
def test_an_own_gpipe_is_gpipe(tmp_path: Path, function: str) -> None:
    name = f"{written(tmp_path, GPIPE)}:{function}"
    mine = make_schedule(name, 3, 4)
    assert mine.order == make_schedule("gpipe", 3, 4).order
    assert (mine.name, mine.num_ranks) == (name, 3)


def test_the_example_in_the_docstring_runs(tmp_path: Path) -> None:
    import barepp.schedules.user_schedule

    text = (
        (barepp.schedules.user_schedule.__doc__ or "")
        .split("import:\n\n")[1]
        .split("\n\nIt must")[0]
    )
    example = "\n".join(line[4:] for line in text.splitlines())
    name = f"{written(tmp_path, example)}:one_after_the_other"
    for stages in range(1, 5):
        assert make_schedule(name, stages, 3).order == make_schedule("naive", stages, 3).order


def test_several_stages_a_rank(tmp_path: Path) -> None:
    text = (
        'def v(s, m, r):\n    assert (s, m, r) == (2, 1, 1)\n    return ["0F0 1F0 1I0 0I0 0W0 1W0"]'
    )
    schedule = make_schedule(f"{written(tmp_path, text)}:v", 2, 1, 1)
    assert len(schedule.order) == 1


def test_the_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    name = f"{written(tmp_path, GPIPE)}:lines"
    make_schedule(name, 2, 2)
    written(tmp_path, GPIPE.replace("def lines", "def other"))
    with pytest.raises(ScheduleError, match="has no function 'lines'; there are objects, .*other$"):
        make_schedule(name, 2, 2)


@pytest.mark.parametrize(
    ("rows", "says", "marked"),
    [
        (["0F0 0F1 0B0 0B1", "1F0 1B1 1F1 1B0"], "1B1 stands before 1F1", "[1B1]"),
        (["0F0 0F1 0B0 0B1", "1F0 1W0 1I0 1F1 1B1"], "1W0 stands before 1I0", "[1W0]"),
        (["0F0 0F1 0B0", "1F0 1B0 1F1 1B1"], "0B1 (or 0I1 and 0W1) is missing", "[0F1]"),
        (["0F0 0F1 0B0 0B1 0F1", "1F0 1B0 1F1 1B1"], "0F1 stands twice", "[0F1]"),
        (["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1 0B1"], "stage 0 is already on rank 0", "[0B1]"),
        (["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"], "rank 0 at 0B0 waits for 1B0", "[1F1]"),
        (["0F0 0F1 0B0 0B1", "1F0 1F1 1B1 1B0"], "1B0 stands after 1B1", "[1B0]"),
        (["0F0 0F7 0B0 0B1", "1F0 1F1 1B0 1B1"], "microbatch 7 does not exist", "[0F7]"),
    ],
)
def test_a_wrong_one_is_shown_with_the_cell_marked(
    tmp_path: Path, rows: list[str], says: str, marked: str
) -> None:
    sentence, grid = refusal(tmp_path, rows).split("\n", 1)
    assert says in sentence
    assert marked in grid
    assert "rank 0" in grid
    assert "rank 1" in grid


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["0F0 0F1 0B0 0B1", "1F0 1X0"], "at rank 1, position 1: '1X0' is not an action"),
        ([["0F0", None]], "at rank 0, position 1: None; an action is written '2B1'"),
        ([[(0, "Q", 1)]], "at rank 0, position 0: (0, 'Q', 1)"),
        ([[(0.5, "F", 1)]], "at rank 0, position 0: (0.5, 'F', 1)"),
        ([7], "gives 7 for rank 0 instead of a list of actions"),
        (None, "'NoneType' object is not iterable"),
        (["0F0 0F1 0B0 0B1"], "is for 2 ranks, but its order lists 1"),
    ],
)
def test_what_is_no_order_at_all_is_a_sentence(tmp_path: Path, rows: object, says: str) -> None:
    message = refusal(tmp_path, rows)
    assert says in message
    assert "mine.py:wrong" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(", "mine.py cannot be read: SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError.* in line 1 of .*mine.py"),
        ("def f(s, m):\n    return []", "TypeError: .*takes 2 positional arguments but 3"),
        ("def f(s, m, r):\n    return 1 / 0", "ZeroDivisionError.* in line 2 of .*mine.py$"),
        ("x = 1", "has no function 'f'; it defines none"),
        ("f = 1\ndef g(): pass", "has no function 'f'; there are g"),
    ],
)
def test_a_file_that_does_not_work_says_where(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        make_schedule(f"{written(tmp_path, text)}:f", 2, 2)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="there is no file nowhere.py"):
        make_schedule("nowhere.py:f", 2, 2)


def test_plan_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{written(tmp_path, GPIPE)}:lines"
    arguments = ["--schedule", name, "--stages", "4", "--microbatches", "8"]
    assert plan([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["makespan"] == 33
    assert plan(arguments) == 0
    assert f"{name}: 4 stages on 4 ranks" in capsys.readouterr().out


def test_plan_shows_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["0F0 0B0", "1B0 1F0"]
    name = f"{written(tmp_path, f'def f(*sizes): return {rows!r}')}:f"
    with pytest.raises(SystemExit) as caught:
        plan(["--schedule", name, "--stages", "2", "--microbatches", "1"])
    assert caught.value.code == 2
    assert "[1B0]" in capsys.readouterr().err


def test_a_pipeline_trains_with_it(tmp_path: Path) -> None:
    """The same bits as GPipe's, also in a step of fewer rows than microbatches."""

    def train(world: barepp.World, schedule: str) -> list[torch.Tensor]:
        pipe = barepp.Pipeline(
            world,
            barepp.mlp(num_layers=3, hidden=8),
            torch.nn.functional.cross_entropy,
            schedule=schedule,
            num_microbatches=4,
        )
        for rows in (8, 3):
            pipe.step(torch.ones(rows, 64), torch.arange(rows))
        return [p.grad.clone() for p in pipe.parameters() if p.grad is not None]

    name = f"{written(tmp_path, GPIPE)}:lines"
    mine, theirs = (barepp.run(train, 2, one, transport="inproc") for one in (name, "gpipe"))
    assert sum(map(len, mine)) == 8
    for ours, gpipe in zip(mine, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, gpipe, strict=True))
