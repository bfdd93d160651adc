"""The reading path of the README: short enough for an afternoon, and without the optional parts."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from jobs import ROOT

README = (ROOT / "README.md").read_text()
POINTS = range(10, 15)
LINES = range(2500, 3301)  # of the first afternoon

# What a run on one host's CPU without tests, traces or benchmarks has no use for.
OPTIONAL = (
    *("transport.cuda", "transport.torch_dist", "barepp.launch.hosts", "barepp.worker.external"),
    *("barepp.worker.faults", "barepp.trace", "barepp.monitor", "barepp.testing", "barepp.bench"),
)
# The executor writes its times down, whether or not anybody looks at them.
RECORDER = {"barepp.trace", "barepp.trace.recorder", "barepp.trace.device_clock"}

SCRIPT = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    found[name] = [key for key in sys.modules if key.startswith(("barepp", "transport"))]
print(json.dumps(found))
"""


def points(heading: str) -> list[list[str]]:
    """Return the files that each numbered point below a heading links to."""
    section = README.split(f"\n{heading}\n")[1].split("\n#")[0]
    numbered = re.split(r"\n\d+\. ", section)[1:]
    return [re.findall(r"\]\(([\w/]+\.py)\)", point) for point in numbered]


FIRST, SECOND = points("## A reading path"), points("### A second afternoon")


@pytest.mark.parametrize("afternoon", [FIRST, SECOND], ids=["first", "second"])
def test_each_point_names_files_of_the_runtime_once(afternoon: list[list[str]]) -> None:
    assert all(afternoon)
    files = [file for point in afternoon for file in point]
    assert len(set(files)) == len(files)
    for file in files:
        assert file.startswith(("barepp/", "transport/")) and (ROOT / file).is_file(), file


def test_the_first_afternoon_is_one() -> None:
    assert len(FIRST) in POINTS
    lines = {f: len((ROOT / f).read_text().splitlines()) for point in FIRST for f in point}
    print(*(f"{count:5} {file}" for file, count in lines.items()), sep="\n")
    print(f"{sum(lines.values()):5} lines together")
    assert sum(lines.values()) in LINES


def test_no_file_of_the_first_afternoon_imports_what_is_optional() -> None:
    names = [f.removesuffix(".py").replace("/", ".") for point in FIRST for f in point]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *names]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name, modules in json.loads(ran.stdout).items():
        optional = {m for m in modules if f"{m}.".startswith(tuple(f"{o}." for o in OPTIONAL))}
        assert optional <= RECORDER, f"{name}: {sorted(optional - RECORDER)}"
