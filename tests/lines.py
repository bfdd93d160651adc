"""How many lines each room has: `python tests/lines.py`, or of another checkout, `… lines.py DIR`.

A line of code is one that holds a token which is neither a comment nor a docstring.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

PACKAGES = ("barepp", "transport", "demos", "tests")
NOTHING = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def code_lines(path: Path) -> int:
    """Return the lines of a file that hold code."""
    with tokenize.open(path) as file:
        lines = set()
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in NOTHING:
                lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                assert first.end_lineno is not None
                lines -= set(range(first.lineno, first.end_lineno + 1))
    return len(lines)


def main(root: Path) -> None:
    """Print the table."""
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).parts
            room = "/".join(parts[: 2 if len(parts) > 2 else 1]) + "/"
            counts = (1, len(path.read_text().splitlines()), code_lines(path))
            for name in {room, f"{package}, all of it"}:
                rooms[name] = [a + b for a, b in zip(rooms[name], counts, strict=True)]
    print(f"{'room':24} {'files':>6} {'lines':>7} {'code':>7}")
    for name in sorted(rooms, key=lambda name: (name.split("/")[0].split(",")[0], name)):
        print(f"{name:24} {rooms[name][0]:6} {rooms[name][1]:7} {rooms[name][2]:7}")
    both = [sum(rooms[f"{package}, all of it"][i] for package in PACKAGES[:2]) for i in range(3)]
    print(f"{'barepp + transport':24} {both[0]:6} {both[1]:7} {both[2]:7}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent)
