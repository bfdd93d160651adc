"""The schedules, by property over every (p, m): m < p and p = 1 included."""

import inspect
import textwrap
from itertools import pairwise, product

import pytest

from barepp.errors import ScheduleError
from barepp.plan.simulate import Costs, simulate
from barepp.plan.text_chart import draw
from barepp.program.actions import Action, Kind, order_text, parse_order
from barepp.program.validation import validate
from barepp.schedules import Schedule, ScheduleFunction, make_schedule, schedule_names
from barepp.schedules.gpipe import gpipe_order
from barepp.schedules.interleaved_1f1b import interleaved_1f1b_order
from barepp.schedules.naive import naive_order
from barepp.schedules.one_f_one_b import one_f_one_b_order
from barepp.schedules.zb_h1 import zb_h1_order
from barepp.schedules.zb_v import zb_v_order

STAGES = range(1, 9)
MICROBATCHES = range(1, 13)
NAMES = ["naive", "gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v"]
WHOLE = ["naive", "gpipe", "1f1b"]  # one stage a rank, no backward is split

everywhere = pytest.mark.parametrize("name", NAMES)


def stages_per_rank(name: str) -> range:
    return {"interleaved_1f1b": range(1, 5), "zb_v": range(2, 3)}.get(name, range(1, 2))


@everywhere
@pytest.mark.parametrize("p", STAGES)
def test_valid_for_every_size(name: str, p: int) -> None:
    for m, v in product(MICROBATCHES, stages_per_rank(name)):
        schedule = make_schedule(name, v * p, m, p)
        assert schedule == Schedule(name, v * p, p, m, schedule.order)
        validate(schedule.order, v * p, m)
        split = name.startswith("zb")
        for rank, actions in enumerate(schedule.order):
            held = {rank, 2 * p - 1 - rank} if name == "zb_v" else set(range(rank, v * p, p))
            assert {action.stage for action in actions} == held
            assert len(actions) == (3 if split else 2) * v * m


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("p", STAGES)
def test_happens_before(name: str, p: int) -> None:
    """In simulated time: F goes down the stages, B comes back up, microbatches in order."""
    for m in MICROBATCHES:
        timeline = simulate(make_schedule(name, p, m).order, p, Costs(forward=3, transfer=2))
        span = {span.action: span for row in timeline.spans for span in row}
        for s in range(p):
            for b in range(m):
                forward, backward = span[Action(s, Kind.F, b)], span[Action(s, Kind.B, b)]
                assert forward.end <= backward.start
                if s + 1 < p:
                    assert forward.end + 2 <= span[Action(s + 1, Kind.F, b)].start
                    assert span[Action(s + 1, Kind.B, b)].end + 2 <= backward.start
                if b + 1 < m:
                    assert forward.end <= span[Action(s, Kind.F, b + 1)].start
                    assert backward.end <= span[Action(s, Kind.B, b + 1)].start


@pytest.mark.parametrize("p", STAGES)
def test_naive_keeps_one_microbatch_in_the_whole_pipeline(p: int) -> None:
    for m in MICROBATCHES:
        timeline = simulate(make_schedule("naive", p, m).order, p, Costs())
        spans = sorted(
            (span for row in timeline.spans for span in row), key=lambda span: span.start
        )
        assert [span.action.microbatch for span in spans] == [
            b for b in range(m) for _ in range(2 * p)
        ]
        assert all(one.end == after.start for one, after in pairwise(spans))


@pytest.mark.parametrize("p", STAGES)
def test_gpipe_drains_only_when_full(p: int) -> None:
    for m in MICROBATCHES:
        for actions in make_schedule("gpipe", p, m).order:
            assert [action.kind for action in actions] == [Kind.F] * m + [Kind.B] * m


@pytest.mark.parametrize("p", STAGES)
def test_1f1b_alternates_after_its_warmup(p: int) -> None:
    for m in MICROBATCHES:
        for rank, actions in enumerate(make_schedule("1f1b", p, m).order):
            warmup = min(p - 1 - rank, m)
            kinds = "".join(action.kind.value for action in actions)
            assert kinds == "F" * warmup + "FB" * (m - warmup) + "B" * warmup


def test_the_lists_of_a_small_case() -> None:
    assert order_text(make_schedule("1f1b", 3, 2).order) == [
        ["0F0", "0F1", "0B0", "0B1"],
        ["1F0", "1F1", "1B0", "1B1"],
        ["2F0", "2B0", "2F1", "2B1"],
    ]


@pytest.mark.parametrize(
    ("function", "stages", "m", "p"),
    [
        (naive_order, 3, 2, 3),
        (gpipe_order, 3, 3, 3),
        (one_f_one_b_order, 3, 4, 3),
        (interleaved_1f1b_order, 4, 2, 2),
        (zb_h1_order, 3, 4, 3),
        (zb_v_order, 4, 3, 2),
    ],
)
def test_the_drawing_in_the_docstring_is_the_schedule(
    function: ScheduleFunction, stages: int, m: int, p: int
) -> None:
    """A schedule is drawn by people and by `draw`; the two must not drift.

    tick    0  1  2  3  4  5  6  7  8  9  10 11 12 13 14
    rank 0  F0 F1 F2 .  .  .  .  .  .  B0--- B1--- B2---
    rank 1  .  F0 F1 F2 .  .  .  B0--- B1--- B2--- .  .
    rank 2  .  .  F0 F1 F2 B0--- B1--- B2--- .  .  .  .
    """
    grid = draw(simulate(list(function(stages, m, p)), stages, Costs())).split("\n\n")[0]
    on_ranks = f" on {p} ranks" if p < stages else ""
    assert f"for {stages} stages{on_ranks} and {m} microbatches" in (function.__doc__ or "")
    assert textwrap.indent(grid, " " * 4) in (inspect.getdoc(function) or "")


def test_the_registry_lists_what_exists() -> None:
    assert schedule_names() == NAMES
    with pytest.raises(ScheduleError, match="'zigzag'; there are naive, gpipe, 1f1b"):
        make_schedule("zigzag", 2, 2)


@pytest.mark.parametrize("name", [*WHOLE, "zb_h1"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_one_stage_on_each_rank(name: str, ranks: int) -> None:
    with pytest.raises(ScheduleError, match=f"^{name} .* 4 stages need 4 ranks, not {ranks}$"):
        make_schedule(name, 4, 2, ranks)
    assert make_schedule(name, 4, 2, 4) == make_schedule(name, 4, 2)


@pytest.mark.parametrize(
    ("name", "stages", "ranks", "says"),
    [
        ("zb_v", 8, 3, "exactly two stages on each rank: 8 stages need 4 ranks, not 3$"),
        ("zb_v", 8, 8, "exactly two stages on each rank: 8 stages need 4 ranks, not 8$"),
        ("zb_v", 5, None, "exactly two stages on each rank: the number of stages is even, not 5$"),
        ("zb_v", 1, None, "the number of stages is even, not 1$"),
        ("interleaved_1f1b", 8, 3, "the number of stages is a multiple of 3 ranks, not 8$"),
        ("interleaved_1f1b", 4, 8, "the number of stages is a multiple of 8 ranks, not 4$"),
    ],
)
def test_several_stages_on_each_rank(name: str, stages: int, ranks: int | None, says: str) -> None:
    with pytest.raises(ScheduleError, match=f"^{name} keeps .*{says}"):
        make_schedule(name, stages, 4, ranks)


def test_how_many_ranks_when_nobody_says() -> None:
    assert make_schedule("zb_v", 8, 4).num_ranks == 4
    assert make_schedule("zb_v", 8, 4) == make_schedule("zb_v", 8, 4, 4)
    assert make_schedule("interleaved_1f1b", 8, 4).num_ranks == 8


@everywhere
@pytest.mark.parametrize(
    ("stages", "microbatches", "ranks", "says"),
    [
        (0, 4, None, "at least 1 stage, not 0"),
        (-2, 4, None, "at least 1 stage, not -2"),
        (4, 0, None, "at least 1 microbatch, not 0"),
        (4, -1, None, "at least 1 microbatch, not -1"),
        (4, 4, 0, "at least 1 rank, not 0"),
    ],
)
def test_sizes_that_cannot_work_are_a_sentence(
    name: str, stages: int, microbatches: int, ranks: int | None, says: str
) -> None:
    with pytest.raises(ScheduleError, match=says):
        make_schedule(name, stages, microbatches, ranks)


def test_a_schedule_written_by_hand_is_held_to_the_same_rules() -> None:
    order = parse_order(["0F0 0B0", "1F0 1B0"])
    assert Schedule("mine", 2, 2, 1, order).order is order
    with pytest.raises(ScheduleError, match="rule 4"):
        Schedule("mine", 2, 2, 1, parse_order(["0F0 0B0", "1B0 1F0"]))
    with pytest.raises(ScheduleError, match="for 3 ranks, but its order lists 2"):
        Schedule("mine", 2, 3, 1, order)
