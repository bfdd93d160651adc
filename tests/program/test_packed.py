"""A packed list reads like the list that it was made from, and millions of actions fit."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Kind, parse_order
from barepp.program.packed import PackedActions, packed

ROW = parse_order(["0F0 3I12 1048575W7 2B1099511627775 0F1"])[0]


def test_it_reads_like_the_list() -> None:
    row = PackedActions(ROW)
    assert list(row) == ROW
    assert [row[i] for i in range(-5, 5)] == ROW + ROW
    assert list(row[1:4]) == ROW[1:4]
    assert len(row) == 5
    assert Action(3, Kind.I, 12) in row
    assert row.index(ROW[3]) == 3
    assert row[0].kind is Kind.F
    assert row.texts() == [str(action) for action in ROW]
    with pytest.raises(IndexError):
        row[5]


def test_it_equals_the_list_and_nothing_else() -> None:
    row = PackedActions(ROW)
    assert row == ROW
    assert [row] == [ROW]
    assert row == PackedActions(ROW)
    assert row != ROW[1:]
    assert row != PackedActions(ROW[::-1])
    assert row != "0F0"
    assert packed(row) is row
    assert packed(ROW) == row
    assert pickle.loads(pickle.dumps(row)) == row == copy.deepcopy(row)
    assert repr(row[:2]) == "<0F0 3I12>"


def test_what_it_knows_of_all() -> None:
    row = PackedActions(ROW)
    assert row.stages() == {0, 2, 3, 2**20 - 1}
    assert row.num_microbatches() == 2**40
    assert PackedActions([]).num_microbatches() == 0
    assert PackedActions([]).stages() == set()


@pytest.mark.parametrize("action", [(-1, 0), (0, -1), (2**20, 0), (0, 2**40)])
def test_what_does_not_fit_is_refused_by_name(action: tuple[int, int]) -> None:
    stage, microbatch = action
    with pytest.raises(ScheduleError, match=f"{stage}W{microbatch} is out of bounds"):
        PackedActions([Action(stage, Kind.W, microbatch)])


def test_an_action_takes_eight_bytes_and_not_a_hundred() -> None:
    """Made, validated and simulated, in a process of its own: 0.2 million actions, all columns."""
    code = """if True:
        import re
        from barepp.schedules import make_schedule
        from barepp.plan.simulate import Costs, simulate

        def high_water_kib():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

        before = high_water_kib()
        timeline = simulate(make_schedule("1f1b", 100, 1000).order, 100, Costs())
        print(timeline.makespan, high_water_kib() - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    makespan, kib = map(int, result.stdout.split())
    assert makespan == 3 * (1000 + 99)
    assert 8 * 200 < kib < 80 * 200
