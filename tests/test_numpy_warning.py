"""torch's warning that NumPy is missing does not show, however a script of barepp's is started."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import LIMIT_S, ROOT, write_script

WARNING = "Failed to initialize NumPy"
TRAIN = """
    import barepp
    import torch

    with barepp.init() as world:
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        print("made by rank", world.rank)
"""
TORCH_FIRST = TRAIN.replace("import barepp", "import torch, barepp")
LAUNCH = ["-m", "barepp.launch", "--world", "2"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(folder: Path, *arguments: str) -> tuple[str, str]:
    (folder / "numpy.py").write_text(
        "raise ModuleNotFoundError('NumPy is not here, for this test')"
    )
    ended = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr


def test_torch_alone_warns(tmp_path: Path) -> None:
    assert WARNING in run(tmp_path, "-c", "import torch")[1]


@pytest.mark.parametrize(
    ("command", "script", "warnings"),
    [
        ([], TRAIN, 0),
        (LAUNCH, TRAIN, 0),
        (LAUNCH, TORCH_FIRST, 0),
        (TORCHRUN, TRAIN, 1),  # torchrun's own process, which imports torch and nothing of ours
    ],
    ids=["python", "launch", "launch, torch first", "torchrun"],
)
def test_no_rank_warns(command: list[str], script: str, warnings: int, tmp_path: Path) -> None:
    out, err = run(tmp_path, *command, str(write_script(tmp_path, script)))
    assert out.count("made by rank") == (2 if command else 1)
    assert (out + err).count(WARNING) == warnings


@pytest.mark.parametrize("demo", sorted((ROOT / "demos").glob("*.py")), ids=lambda path: path.stem)
def test_a_demo_imports_barepp_before_torch(demo: Path) -> None:
    """Or a file that does so, or no torch at all."""
    first: dict[str, int] = {}
    for node in ast.parse(demo.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            first.setdefault(name.partition(".")[0], node.lineno)
    ours = {path.stem for path in demo.parent.glob("*.py")} | {"barepp"}
    torch = first.get("torch", 10**6)
    assert torch == 10**6 or any(first.get(name, torch) < torch for name in ours)
