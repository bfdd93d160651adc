"""The command line: what it prints, how it refuses, and that it needs no torch."""

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest

from barepp.plan import main


def planned(capsys: pytest.CaptureFixture[str], line: str) -> Any:
    assert main([*shlex.split(line), "--json"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    return json.loads(out.out)


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))
    assert caught.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.count("\n") == 1
    return out.err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--schedule 1f1b --stages 2 --microbatches 2")
    assert found == {
        "schedule": "1f1b",
        "stages": 2,
        "ranks": 2,
        "microbatches": 2,
        "order": [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]],
        "makespan": 9,
        "bubble": 1 / 3,
        "peak_in_flight": [2, 1],
    }
    assert list(found) == [
        "schedule", "stages", "ranks", "microbatches", "order", "makespan", "bubble",
        "peak_in_flight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "makespan"),
    [
        ("--schedule naive --stages 4 --microbatches 8", 96),
        ("--schedule gpipe --stages 4 --microbatches 8", 33),
        ("--schedule 1f1b --stages 4 --microbatches 8 --ranks 4", 33),
        ("--schedule 1f1b --stages 8 --microbatches 16", 69),
        ("--schedule gpipe --stages 2 --microbatches 4 --forward-cost 0.5", 12.5),
        ("--schedule gpipe --stages 2 --microbatches 4 --backward-input-cost 3", 25),
        ("--schedule gpipe --stages 2 --microbatches 4 --backward-weight-cost 0", 10),
        ("--schedule naive --stages 2 --microbatches 2 --transfer-cost 0.1", 12.4),
        ("--schedule gpipe --stages 1 --microbatches 10 --forward-cost 0.1 "
         "--backward-input-cost 0.1 --backward-weight-cost 0.1", 3),
    ],
)  # fmt: skip
def test_makespans(capsys: pytest.CaptureFixture[str], line: str, makespan: float) -> None:
    assert planned(capsys, line)["makespan"] == makespan


def test_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("--schedule gpipe --stages 3 --microbatches 4")) == 0
    text = capsys.readouterr().out
    assert text.startswith("gpipe: 3 stages on 3 ranks, 4 microbatches\n\ntick    0  1  2 ")
    assert "rank 0  F0 F1 F2 F3 .  .  .  .  .  .  B0---" in text
    assert "makespan        18" in text
    assert "bubble          33.3% = 1 - busy / (ranks * makespan) = 1 - 36 / (3 * 18)" in text
    assert "in theory     33.3% = (p - 1) / (m + p - 1) = 2 / 6\n" in text
    assert "peak in-flight  4, 4, 4" in text
    assert text.isascii()


def test_theory_is_only_where_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split("--schedule naive --stages 3 --microbatches 4"))
    assert "theory" not in capsys.readouterr().out
    main(shlex.split("--schedule 1f1b --stages 3 --microbatches 4 --transfer-cost 1"))
    assert "2 / 6 if transfers took no time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--schedule zigzag --stages 2 --microbatches 2", "naive, gpipe, 1f1b"),
        ("--schedule gpipe --stages 4 --microbatches 2 --ranks 2", "4 stages need 4 ranks, not 2"),
        ("--schedule gpipe --stages 0 --microbatches 2", "at least 1 stage, not 0"),
        ("--schedule gpipe --stages 2 --microbatches 0", "at least 1 microbatch, not 0"),
        ("--schedule gpipe --stages 2 --microbatches 2 --ranks 0", "at least 1 rank, not 0"),
        ("--schedule gpipe --stages two --microbatches 2", "'two'"),
        ("--schedule gpipe --stages 2", "--microbatches"),
        ("--stages 2 --microbatches 2", "--schedule"),
        ("--schedule gpipe --stages 2 --microbatches 2 --forward-cost -1", "forward cost is -1"),
        ("--schedule gpipe --stages 2 --microbatches 2 --forward-cost nan", "'nan' is not"),
        ("--schedule gpipe --stages 2 --microbatches 2 --transfer-cost 1/0", "'1/0' is not"),
        ("--schedule gpipe --stages 2 --microbatches 2 --frobnicate", "--frobnicate"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    assert says in refused(capsys, line)


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    """`python -m barepp.plan … | head -1`, with more output than a pipe holds."""
    command = [sys.executable, "-m", "barepp.plan", "--schedule", "gpipe"]
    command += ["--stages", "4", "--microbatches", "6000", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


def test_the_pure_zone_starts_without_torch_and_without_transport() -> None:
    code = (
        "import sys, barepp.plan; "
        "print([name for name in ('torch', 'transport', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"
