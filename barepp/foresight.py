"""What the ranks will import, seen from the script's text, so that the fork server does it once.

An optimizer imports torch._dynamo at its first use, which takes as long as importing torch itself.
Done by every rank that is seconds for each; done before the ranks are forked it is once for all. A
script without an optimizer should not wait for it at all. So the text is asked: the script's own,
and that of the modules beside it that it imports. Where that misleads, a rank imports it itself.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Final

from barepp.assignment import Call, Script, Task

OPTIMIZERS: Final = "optim"  # as in torch.optim.Adam
NEEDED_BY_OPTIMIZERS: Final = "torch._dynamo"


def preloads(task: Task) -> list[str]:
    """Return the modules that are worth importing before the ranks are forked."""
    if isinstance(task, Script):
        path: str | None = task.path
    elif isinstance(task, Call):
        try:
            path = inspect.getsourcefile(task.function)
        except TypeError:  # a callable object, a partial
            path = None
    else:
        path = None
    mentioned = path is not None and _mentions(Path(path), OPTIMIZERS, set())
    return [NEEDED_BY_OPTIMIZERS] if mentioned else []


def _mentions(path: Path, word: str, seen: set[Path]) -> bool:
    """Whether the word is in a Python file, or in one beside it that it imports."""
    seen.add(path)
    try:
        text = path.read_text()
        if word in text:
            return True
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):  # who runs it will say so
        return False
    beside = (path.parent / f"{name}.py" for name in _imported(tree))
    return any(_mentions(other, word, seen) for other in beside if other not in seen)


def _imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}
