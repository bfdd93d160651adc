"""The command line: what it prints, how it refuses, and that it needs no torch."""

import json
import shlex
import subprocess
import sys
from fractions import Fraction
from itertools import product
from typing import Any

import pytest

from barepp.plan.__main__ import main
from barepp.plan.simulate import Costs, simulate
from barepp.plan.theory import bubble_in_theory
from barepp.program.actions import order_text
from barepp.schedules import make_schedule, schedule_names


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
        ("--schedule gpipe --stages 1 --microbatches 2 --forward-cost 1e15", 2e15 + 4),
        ("--schedule gpipe --stages 1 --microbatches 1 --forward-cost 1e-15", 2 + 1e-15),
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
    main(shlex.split("--schedule zb_h1 --stages 3 --microbatches 4 --forward-cost 2"))
    assert "theory" not in capsys.readouterr().out
    main(shlex.split("--schedule gpipe --stages 3 --microbatches 4 --forward-cost 2,1,1"))
    assert "theory" not in capsys.readouterr().out
    main(shlex.split("--schedule 1f1b --stages 3 --microbatches 4 --transfer-cost 1"))
    assert "2 / 6 if transfers took no time" in capsys.readouterr().out


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize("p", range(1, 7))
def test_where_there_is_a_theory_the_simulation_agrees(name: str, p: int) -> None:
    shares = {"interleaved_1f1b": range(1, 4), "zb_v": range(2, 3)}.get(name, range(1, 2))
    agreed = 0
    for m, v, costs in product(range(1, 14), shares, [Costs(1, 1, 1), Costs(2, 3, 1)]):
        schedule = make_schedule(name, v * p, m, p)
        theory = bubble_in_theory(schedule, costs)
        if theory is not None:
            bubble = simulate(schedule.order, v * p, costs).bubble
            assert bubble == pytest.approx(theory.idle / theory.whole, abs=1e-12)
            agreed += 1
    assert agreed >= 2


GOLDEN = {  # design: p, m = 4, 8: the makespan and bubble of each schedule
    "naive": (4, 1, 96),
    "gpipe": (4, 1, 33),
    "1f1b": (4, 1, 33),
    "interleaved_1f1b": (8, Fraction(1, 2), 28.5),
    "zb_h1": (4, 1, 27),
    "zb_v": (8, Fraction(1, 2), 25.5),
}


@pytest.mark.parametrize("name", schedule_names())
def test_golden_plans(capsys: pytest.CaptureFixture[str], name: str) -> None:
    stages, cost, makespan = GOLDEN[name]
    costs = " ".join(
        f"--{what}-cost {float(cost)}" for what in ("forward", "backward-input", "backward-weight")
    )
    ranks = "--ranks 4" if name == "interleaved_1f1b" else ""
    line = f"--schedule {name} --stages {stages} --microbatches 8 {ranks} {costs}"
    found = planned(capsys, line)
    assert (found["ranks"], found["makespan"]) == (4, makespan)
    assert found["bubble"] == pytest.approx(1 - 24 / makespan)
    assert found["order"] == order_text(make_schedule(name, stages, 8, 4).order)
    peaks = {
        "naive": [1, 1, 1, 1],
        "gpipe": [8, 8, 8, 8],
        "1f1b": [4, 3, 2, 1],
        "interleaved_1f1b": [11, 9, 7, 5],
        "zb_h1": [4, 4, 4, 4],
        "zb_v": [8, 8, 8, 8],
    }
    assert found["peak_in_flight"] == peaks[name]


def test_a_cost_for_each_stage_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """GPipe: the sum over the stages, plus m - 1 times the slowest forward and backward."""
    line = "--schedule gpipe --stages 3 --microbatches 4 --forward-cost 1,2,0.5"
    found = planned(capsys, f"{line} --activation-bytes 100,20,3")
    assert found["makespan"] == 3.5 + 6 + 3 * (2 + 2)
    assert found["peak_bytes"] == [400, 80, 12]
    line = "--schedule 1f1b --stages 3 --microbatches 4 --activation-bytes 7"
    assert planned(capsys, line)["peak_bytes"] == [21, 14, 7]
    assert main(shlex.split(line)) == 0
    assert "peak bytes      21, 14, 7 (rank 0 first" in capsys.readouterr().out


def test_one_of_a_thing_is_singular(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split("--schedule gpipe --stages 1 --microbatches 1"))
    assert capsys.readouterr().out.startswith("gpipe: 1 stage on 1 rank, 1 microbatch\n")
    main(shlex.split("--schedule zb_v --stages 2 --microbatches 2"))
    assert capsys.readouterr().out.startswith("zb_v: 2 stages on 1 rank, 2 microbatches\n")


def test_a_plan_too_large_to_draw_still_has_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split("--schedule 1f1b --stages 40 --microbatches 700"))
    out = capsys.readouterr().out
    assert "(56000 actions are too many to draw)" in out
    assert "makespan        2217\n" in out
    assert "peak in-flight  40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, ..., 4, 3, 2, 1" in out


def test_costs_that_are_worlds_apart_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split("--schedule 1f1b --stages 2 --microbatches 2 --forward-cost 1e15,1e-15"))
    out = capsys.readouterr().out
    assert "rank 0  F0------" in out and "ticks are not drawn)" in out


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
        ("--schedule gpipe --stages 2 --microbatches 2 --forward-cost 1,2,3", "for 3 stages"),
        ("--schedule gpipe --stages 2 --microbatches 2 --activation-bytes 1,2,3", "2 stages, not"),
        ("--schedule gpipe --stages 2 --microbatches 2 --activation-bytes -1", "from 0 up"),
        ("--schedule gpipe --stages 2 --microbatches 2 --activation-bytes 1.5", "whole number"),
        ("--schedule zb_v --stages 5 --microbatches 2", "the number of stages is even, not 5"),
        ("--schedule interleaved_1f1b --stages 6 --ranks 4 --microbatches 2", "a multiple of 4"),
        ("--schedule gpipe --stages 1000 --microbatches 101", "an order may have 200000"),
        ("--schedule gpipe --stages 1025 --microbatches 1", "1025 stages are too many: a plan may"),
        ("--schedule gpipe --stages 100000000 --microbatches 0", "a plan may have 1024"),
        *[
            (f"--schedule gpipe --stages 2 --microbatches 2 --forward-cost {cost}", "1e-15 to 1e15")
            for cost in ("1e400", "1e999999999", "1e-999999999", "1e16", "1e-16", "1," + "1" * 41)
        ],
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    assert says in refused(capsys, line)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a Fraction takes no underscores there")
def test_an_exponent_with_underscores_is_an_exponent(capsys: pytest.CaptureFixture[str]) -> None:
    """It was not seen as one: the plan then went on writing the number's digits out for ever."""
    line = "--schedule gpipe --stages 2 --microbatches 2 --forward-cost 1e999_999_999"
    assert "1e-15 to 1e15" in refused(capsys, line)


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
