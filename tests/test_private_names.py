"""Undocumented names of torch and of Python stand in one file; read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from jobs import ROOT

HOME = "transport/private_names.py"
OURS = ("barepp", "transport", "demos")
# They begin with an underscore, and Python's manual has them all the same.
MODULE = re.compile(r"[a-z]\w*(\.\w+)*\._\w+(\.\w+)*")  # "torch._dynamo", in a string
DOCUMENTED = {"_exit", "_current_frames", "_replace", "_asdict", "_make", "_fields_", "_fields"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def defined_by(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a source defines: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) in ("self", "cls") else []


def foreign_names(tree: ast.AST) -> set[str]:
    """Return what a source calls the modules of others, and what it imports from them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                if top not in OURS:
                    found.add(alias.asname or top)
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] not in OURS:
            found.update(alias.asname or alias.name for alias in node.names)
    return found


def root_of(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def private_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each private name of others that a source uses.

    `own` are all names of ours. An object of ours has them, if it is `self`; another one may be a
    tensor, and has those that stand in this source alone.
    """
    foreign, here = foreign_names(tree), set(defined_by(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr in DOCUMENTED:
                continue
            known = own if ast.unparse(node.value) in ("self", "cls") else here
            if root_of(node.value) in foreign or node.attr not in known:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] not in OURS:
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            if any(map(is_private, parts)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import):
            if any(is_private(part) for alias in node.names for part in alias.name.split(".")):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = getattr(node.args[1], "value", "")
            if is_private(name) and name not in here:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and MODULE.fullmatch(str(node.value)):
            yield node.lineno, repr(node.value)


def test_private_names_of_others_stand_in_one_file() -> None:
    trees = {
        path: ast.parse(path.read_bytes())
        for package in OURS
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    own = {name for path, tree in trees.items() if where(path) != HOME for name in defined_by(tree)}
    found = {where(path): list(private_names(tree, own)) for path, tree in trees.items()}
    assert found.pop(HOME), "the test finds none where they are"
    assert not [(path, *use) for path, uses in found.items() for use in uses]


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_each_of_them_is_explained() -> None:
    """A function that uses one says which versions have it, and what happens without it."""
    tree = ast.parse((ROOT / HOME).read_bytes())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and list(private_names(node, set())):
            text = ast.get_docstring(node) or ""
            assert "ersions" in text, node.name


def test_the_reader_of_names_finds_each_kind() -> None:
    sources = {
        "import torch._dynamo": "import torch._dynamo",
        "from torch._C import Store": "from torch._C import Store",
        "from torch.nn import _reduction as r": "from torch.nn import _reduction as r",
        "import torch\ntorch.cuda._is_in_bad_fork()": "torch.cuda._is_in_bad_fork",
        "import threading as t\nt._stop": "t._stop",  # also where a name of ours is the same
        "def f(layer): return layer._forward_hooks": "layer._forward_hooks",
        "def f(gradient): return gradient._stop()": "gradient._stop",  # which we define elsewhere
        "getattr(x, '_config', None)": "getattr(x, '_config', None)",
        "NAME = 'torch._dynamo'": "'torch._dynamo'",
    }
    for source, expected in sources.items():
        assert expected in [text for _, text in private_names(ast.parse(source), {"_stop"})]
    fine = "import os, sys\nself._stop\nos._exit(0)\nsys._current_frames()\nx.__dict__\ny = '_z'"
    assert not list(private_names(ast.parse(fine), {"_stop"}))
