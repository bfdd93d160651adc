"""The rooms: which may import which, and what each says of itself; read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import ROOT

# A room may import itself and what stands in a line above its own. "errors" stands for errors.py,
# "barepp" for the package itself, whose public names are imported at first use.
FLOORS = {
    "transport": """
        errors private_names
        device wire
        message
        base
        collectives inproc sockets
        shm rendezvous
        cuda
        torch_dist
        registry
        transport
        bench
    """,
    "barepp": """
        errors cli
        program
        schedules monitor
        worker plan
        trace
        train
        launch
        testing
        barepp
        bench timeline top stacks
    """,
}
MOST_ENTRIES = 14  # of a folder: more is more than one idea


def floor_of(package: str) -> dict[str, int]:
    lines = FLOORS[package].split("\n")
    return {room: floor for floor, line in enumerate(lines) for room in line.split()}


def modules() -> dict[str, Path]:
    found = {}
    for package in FLOORS:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
ROOMS = sorted({path.parent for path in MODULES.values()})


def imported(path: Path) -> Iterator[str]:
    """Yield our modules that a file imports, wherever in it: in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)


def room_of(module: str) -> str:
    """Return the part below the package, or the package itself."""
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_its_floor(package: str) -> None:
    rooms = {room_of(name) for name in MODULES if name.startswith(f"{package}.")}
    assert rooms | {package} == set(floor_of(package))


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_points_upwards(package: str) -> None:
    floors = floor_of(package)
    wrong = []
    for name, path in MODULES.items():
        if not name.startswith(f"{package}."):
            continue
        mine = room_of(name)
        for other in imported(path):
            if other.partition(".")[0] != package:
                continue
            if (theirs := room_of(other)) != mine and floors[theirs] >= floors[mine]:
                wrong.append(f"{name} imports {other}: {mine} may not import {theirs}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_part_of_a_circle() -> None:
    """Not even by what a function imports when it is called, or for types alone."""
    graph = {name: set(imported(path)) - {name} for name, path in MODULES.items()}
    while free := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"among these is a circle of imports: {sorted(graph)}"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_a_room_is_small_and_names_its_files_in_reading_order(room: Path) -> None:
    files = {path.name for path in room.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in room.glob("*/__init__.py")}
    if room.parent == ROOT:
        return  # the README of the package names its rooms
    assert len(files | folders) <= MOST_ENTRIES
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    listed = re.findall(r"^    ([\w/]+(?:\.py)?)  ", text, re.MULTILINE)
    assert set(listed) == files | folders, "the room's __init__ names other files"
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("package", FLOORS)
def test_the_package_names_its_rooms(package: str) -> None:
    text = (ROOT / package / "README.md").read_text()
    rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    listed = set(re.findall(r"^\| \[`([\w.]+?)/?`\]", text, re.MULTILINE))
    assert listed == rooms | files
