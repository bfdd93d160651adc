"""What the fork server imports before the ranks exist: as much as the script will need, no more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jobs import ROOT, launch, write_script

from barepp.launch.processes.fork_server import preloads
from barepp.worker.spec import Call, Script


def of(path: Path) -> list[str]:
    return preloads(Script(str(path)))


def test_the_training_demos_are_seen_to_need_an_optimizer():
    for demo in ("gpipe", "one_f_one_b", "naive"):
        assert of(ROOT / "demos" / f"{demo}.py") == ["torch._dynamo"]
    assert of(ROOT / "demos" / "ping_pong.py") == []


def test_modules_beside_the_script_are_read_and_circles_end(tmp_path):
    write_script(tmp_path, "from helper import train\nimport os, json", "main.py")
    write_script(tmp_path, "import main, deeper.thing", "helper.py")
    assert of(tmp_path / "main.py") == []
    write_script(tmp_path, "from torch.optim import SGD", "deeper.py")
    assert of(tmp_path / "main.py") == ["torch._dynamo"]


@pytest.mark.parametrize("text", ["def broken(", "\0", None])
def test_what_cannot_be_read_is_left_to_whoever_runs_it(tmp_path, text):
    path = tmp_path / "script.py"
    if text is not None:
        path.write_text(text)
    assert of(path) == []


def test_a_function_is_judged_by_the_file_that_it_is_from(tmp_path):
    assert preloads(Call(preloads)) == ["torch._dynamo"]  # that file says the word
    assert preloads(Call(of)) == ["torch._dynamo"]  # and so does this one
    assert preloads(Call(print)) == []
    assert preloads(Call(sys.exit)) == []


def test_ranks_find_the_optimizers_imports_done_or_not_begun(tmp_path):
    script = """
        import sys
        import barepp
        with barepp.init() as world:
            print("there", "torch._dynamo" in sys.modules)
    """
    for text, found in (
        (script, "False"),
        (script.replace("import sys", "import sys  # optim"), "True"),
    ):
        finished = launch(tmp_path, text, "--world", "1")
        assert finished.code == 0, finished.err
        assert finished.said(0) == [f"there {found}"]
