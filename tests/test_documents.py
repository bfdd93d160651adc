"""What the documents say is true: commands, tables and pictures are held against the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import barepp
import transport
from barepp.plan.__main__ import main as plan
from transport.wire.format import HEADER, MAGIC, FrameKind

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROOMS = {name: (ROOT / name / "README.md").read_text() for name in ("barepp", "transport")}


def rows(table_head: str, text: str) -> list[list[str]]:
    """Return the cells of the Markdown table whose head line starts like this."""
    lines = text[text.index(table_head) :].splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_the_two_commands_are_there_for_ci_to_run():
    assert "pip install -e . && python -m barepp.launch --world 4 demos/gpipe.py\n" in README
    assert "pip install -e '.[test]' && python -m pytest\n" in README


@pytest.mark.parametrize("document", ["README.md", "barepp/README.md", "transport/README.md"])
def test_every_link_leads_somewhere(document):
    path = ROOT / document
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    assert links
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (path.parent / link).exists(), link


def test_pyproject_claims_no_version_that_has_not_run():
    """The oldest and the newest of the README's table are the ends of the range."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    table = rows("| Python | torch |", README)
    for column, name in enumerate(('requires-python = "', '"torch')):
        ran = [version(row[column]) for row in table]
        bounds = re.search(re.escape(name) + r">=([\d.]+),<([\d.]+)", pyproject)
        assert bounds is not None, f"{name} has no lower or no upper bound"
        major, minor = max(ran)
        assert version(bounds[1]) >= min(ran)
        assert version(bounds[2]) <= (major, minor + 1)


def version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def test_the_commands_of_the_course_name_what_exists():
    commands = re.findall(r"`(python [^`]+)`", README)
    assert len(commands) > 8
    for command in commands:
        for word in shlex.split(command):
            if word.endswith(".py") and word != "script.py":
                assert (ROOT / word).is_file(), command


def test_the_steps_of_the_course_are_counted_alike():
    """A demo says in its first line at which step it comes first in the README's table."""
    told = {}
    for number, (step, command, _) in enumerate(rows("| step | run |", README), start=1):
        assert step.startswith(f"{number}. "), step
        for demo in re.findall(r"demos/(\w+)\.py", command):
            told.setdefault(demo, number)
    assert len(told) > 10
    for demo, number in told.items():
        first = (ROOT / "demos" / f"{demo}.py").read_text().splitlines()[0]
        assert first.startswith(f'"""Step {number} of the course: '), first


def test_each_step_ends_with_what_can_now_be_said():
    """The README lists one sentence for each step; a demo's docstring ends with its own."""
    listed = README[README.index("After each step you should be able to say:") :].split("\n## ")[0]
    sentences = re.findall(r"^\d+\. (.*?)(?=\n\d+\. |\n*\Z)", listed, re.MULTILINE | re.DOTALL)
    sentences = [" ".join(sentence.split()) for sentence in sentences]
    steps = rows("| step | run |", README)
    assert len(sentences) == len(steps)
    said = set()
    for sentence, (_, command, _) in zip(sentences, steps, strict=True):
        for demo in set(re.findall(r"demos/(\w+)\.py", command)) - said:
            said.add(demo)
            manual = (ROOT / "demos" / f"{demo}.py").read_text().split('"""')[1]
            last = " ".join(manual.strip().split("\n\n")[-1].split())
            assert last.casefold() == f"You can now say: {sentence}".casefold(), demo
    assert len(said) > 12


@pytest.mark.parametrize(
    ("arguments", "picture"),
    re.findall(r"`(--schedule [^`]+)`.*?```\n(.*?)```", README, re.DOTALL),
)
def test_the_pictures_are_what_plan_prints(arguments, picture, capsys):
    assert plan(shlex.split(arguments)) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    drawn = [line.rstrip() for line in picture.splitlines()]
    assert drawn and all(line in printed for line in drawn)


def test_the_readme_shows_all_three_pictures():
    assert README.count("tick    0") == 3


def test_every_schedule_is_in_the_table():
    table = rows("| schedule | paper |", ROOMS["barepp"])
    assert [row[0].strip("`") for row in table] == barepp.schedule_names()


def test_your_own_schedule_and_what_a_wrong_one_is_told(tmp_path, capsys):
    [code] = re.findall(r"```py\n(def my_schedule.*?)```", README, re.DOTALL)
    file = tmp_path / "file.py"
    file.write_text(code)
    sizes = ["--stages", "2", "--microbatches", "2"]
    assert plan(["--schedule", f"{file}:my_schedule", *sizes]) == 0
    assert "rank 1  .  F0 B0--- F1 B1---" in capsys.readouterr().out
    file.write_text(
        code.replace("0F0 0F1 0B0 0B1", "0F0 0B0 0F1 0B1").replace("1B0 1F1", "1F1 1B0")
    )
    with pytest.raises(SystemExit):
        plan(["--schedule", f"{file}:my_schedule", *sizes])
    told = README[README.index("invalid order, rule 6") :].split("```")[0]
    assert told in capsys.readouterr().err


def test_the_wire_table_is_the_struct():
    sizes = {"B": 1, "I": 4, "Q": 8, "q": 8, "4s": 4, "3x": 3}
    fields = re.findall(r"\d*[a-zA-Z]", HEADER.format.lstrip("<").replace("II", "I I"))
    offset = 0
    expected = []
    for field in fields:
        expected.append((offset, sizes[field]))
        offset += sizes[field]
    assert offset == HEADER.size
    table = rows("| offset |", ROOMS["transport"])
    assert [(int(row[0]), int(row[1])) for row in table] == expected
    assert repr(MAGIC)[1:].strip("'") in table[0][3]
    for kind in FrameKind:
        assert f"{kind.value} {kind.name.lower()}" in table[1][3]


def test_the_readmes_script_runs_as_it_stands(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(code)
    losses = set()
    for command in ([sys.executable], [sys.executable, "-m", "barepp.launch", "--world", "4"]):
        done = subprocess.run(
            [*command, str(script)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        losses.add(re.search(r"loss \d+\.\d+", done.stdout) is not None)
    assert losses == {True}


@pytest.mark.parametrize("package", [barepp, transport])
def test_the_public_names_exist(package):
    assert sorted(package.__all__) == package.__all__
    for name in package.__all__:
        assert getattr(package, name).__doc__


def test_nothing_stands_at_the_top_that_does_not_belong_there():
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, timeout=30, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"README.md", "pyproject.toml", "barepp", "transport", "tests", "demos", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_the_version_stands_in_two_places():
    assert f'version = "{barepp.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
