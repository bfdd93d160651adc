"""Simulated times equal the theory's, and the drawing shows exactly the simulated spans."""

import random
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
from orders import BY_HAND, INTERLEAVED, LOOP, SPLIT

from barepp.errors import ScheduleError, UsageError
from barepp.plan.simulate import Costs, simulate
from barepp.plan.text_chart import draw
from barepp.plan.timeline import Timeline
from barepp.program.actions import Action, Kind, Order, parse_order
from barepp.program.dependencies import dependencies, result_name
from barepp.program.dry_run import Span
from barepp.schedules import make_schedule, schedule_names

STAGES = range(1, 9)
MICROBATCHES = range(1, 13)


def run(name: str, p: int, m: int, costs: Costs | None = None) -> Timeline:
    return simulate(make_schedule(name, p, m).order, p, costs or Costs())


# Per rank and microbatch F = I = W = 1, so with v stages a rank 1/v for each stage.
GOLDEN = [
    # p, m, naive, gpipe, 1f1b, interleaved_1f1b with v = 2, zb_h1, zb_v
    (4, 8, [96, 33, 33, 28.5, 27, 25.5]),
    (2, 4, [24, 15, 15, 13.5, 13, 12.5]),
    (8, 16, [384, 69, 69, 58.5, 55, 51.5]),
]


def shared_out(
    name: str, p: int, m: int, v: int, rank_costs: tuple[int, int, int] = (1, 1, 1)
) -> Timeline:
    """Simulate v stages on each of p ranks, each stage 1/v of what a rank costs."""
    costs = Costs(*(Fraction(cost, v) for cost in rank_costs))
    return simulate(make_schedule(name, v * p, m, p).order, v * p, costs)


@pytest.mark.parametrize(("p", "m", "makespans"), GOLDEN)
def test_golden_makespans(p: int, m: int, makespans: list[float]) -> None:
    for name, makespan in zip(schedule_names(), makespans, strict=True):
        timeline = shared_out(name, p, m, 2 if name in ("interleaved_1f1b", "zb_v") else 1)
        assert timeline.makespan == makespan
        assert timeline.busy == 3 * p * m
        assert timeline.bubble == pytest.approx(1 - 3 * m / makespan, abs=1e-15)
    assert isinstance(run("gpipe", p, m).makespan, int)


@pytest.mark.parametrize("v", range(1, 5))
@pytest.mark.parametrize("p", range(1, 7))
@pytest.mark.parametrize("costs", [(1, 1, 1), (3, 2, 2), (1, 3, 1), (1, 1, 0)])
def test_interleaving_shrinks_the_bubble_and_never_grows_it(
    p: int, v: int, costs: tuple[int, int, int]
) -> None:
    for m in range(1, 16):
        makespan = shared_out("interleaved_1f1b", p, m, v, costs).makespan
        assert makespan <= (m + p - 1) * sum(costs)  # 1F1B
        if m % p == 0:
            assert makespan == sum(costs) * (m + Fraction(p - 1, v))


@pytest.mark.parametrize("p", STAGES)
def test_the_bubble_of_zb_h1(p: int) -> None:
    for m in range(1, 3 * p):
        assert run("zb_h1", p, m).makespan == max(3 * m + p - 1, 2 * m + 2 * p - 1)


@pytest.mark.parametrize("p", STAGES)
@pytest.mark.parametrize(
    "costs", [(2, 2, 2), (3, 2, 2), (1, 2, 1), (1, 1, 2), (2, 3, 1), (1, 1, 0)]
)
def test_splitting_the_backward_never_costs_time(p: int, costs: tuple[int, int, int]) -> None:
    for m in MICROBATCHES:
        assert run("zb_h1", p, m, Costs(*costs)).makespan <= (m + p - 1) * sum(costs)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_clever_is_never_slower_than_1f1b(seed: int) -> None:
    rng = random.Random(seed)
    p, m, v = rng.randint(1, 8), rng.randint(1, 20), rng.randint(1, 4)
    costs = rng.randint(1, 9), rng.randint(1, 9), rng.randint(0, 9)
    plain = run("1f1b", p, m, Costs(*costs)).makespan
    assert run("zb_h1", p, m, Costs(*costs)).makespan <= plain
    assert shared_out("interleaved_1f1b", p, m, v, costs).makespan <= plain
    assert shared_out("zb_v", p, m, 2, costs).makespan <= plain


@pytest.mark.parametrize("p", STAGES)
def test_the_bubble_of_zb_v(p: int) -> None:
    for m in range(1, 3 * p):
        makespan = shared_out("zb_v", p, m, 2).makespan
        assert makespan == max(3 * m + Fraction(p - 1, 2), 2 * m + 2 * p - 1)
        assert makespan <= run("zb_h1", p, m).makespan
        if m >= 2 * p:
            assert makespan <= shared_out("interleaved_1f1b", p, m, 2).makespan


@pytest.mark.parametrize("p", STAGES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("costs", [(1, 1, 1), (1, 1, 0), (2, 1, 2), (5, 1, 1), (3, 2, 5)])
def test_bubble_is_p_minus_1_over_m_plus_p_minus_1(
    name: str, p: int, costs: tuple[int, int, int]
) -> None:
    for m in MICROBATCHES:
        timeline = run(name, p, m, Costs(*costs))
        assert timeline.makespan == (m + p - 1) * sum(costs)
        assert timeline.busy == p * m * sum(costs)
        assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-15)


@pytest.mark.parametrize("p", STAGES)
def test_naive_takes_the_sum_of_everything(p: int) -> None:
    for m in MICROBATCHES:
        timeline = run("naive", p, m, Costs(2, 1, 3))
        assert timeline.makespan == p * m * 6
        assert timeline.bubble == pytest.approx(1 - 1 / p)


@pytest.mark.parametrize("p", STAGES)
def test_peak_in_flight(p: int) -> None:
    for m in MICROBATCHES:
        assert run("naive", p, m).peak_in_flight == [1] * p
        assert run("gpipe", p, m).peak_in_flight == [m] * p
        assert run("1f1b", p, m).peak_in_flight == [min(m, p - rank) for rank in range(p)]


@pytest.mark.parametrize("p", range(1, 7))
@pytest.mark.parametrize("v", range(1, 5))
def test_peak_in_flight_with_several_stages(p: int, v: int) -> None:
    for m in range(1, 20):
        peaks = shared_out("interleaved_1f1b", p, m, v).peak_in_flight
        theory = [min(v * m, (v - 1) * p + 2 * (p - 1 - rank) + 1) for rank in range(p)]
        if p < m < 2 * p and v > 1:  # the second group of p is short: never more, often less
            assert all(peak <= bound for peak, bound in zip(peaks, theory, strict=True))
        else:
            assert peaks == theory


@pytest.mark.parametrize("p", STAGES)
def test_peak_in_flight_of_split_backwards(p: int) -> None:
    for m in range(1, 3 * p):
        assert run("zb_h1", p, m).peak_in_flight == [min(m, p)] * p
        halves = shared_out("zb_v", p, m, 2).peak_in_flight
        assert max(halves) <= min(2 * m, 2 * p)
        if m >= 2 * p - 1:
            assert halves == [2 * p] * p


def test_until_its_w_a_split_backward_is_in_flight() -> None:
    assert simulate(SPLIT, 2, Costs()).peak_in_flight == [2, 2]
    assert simulate(parse_order(["0F0 0I0 0F1 0I1 0W0 0W1"]), 1, Costs()).peak_in_flight == [2]
    assert simulate(parse_order(["0F0 0I0 0W0 0F1 0I1 0W1"]), 1, Costs()).peak_in_flight == [1]


@pytest.mark.parametrize("p", STAGES)
def test_gpipe_with_a_cost_for_each_stage(p: int) -> None:
    """The sum over the stages, plus m - 1 times the slowest forward and the slowest backward."""
    for m in MICROBATCHES:
        forward = [2 + s * 5 % 7 for s in range(p)]
        inputs = [1 + s * 3 % 5 for s in range(p)]
        weights = [s * 2 % 3 for s in range(p)]
        full = [i + w for i, w in zip(inputs, weights, strict=True)]
        expected = sum(forward) + sum(full) + (m - 1) * (max(forward) + max(full))
        assert run("gpipe", p, m, Costs(forward, inputs, weights)).makespan == expected


def test_transfer_delays_the_receiver_and_not_the_sender() -> None:
    spans = run("gpipe", 2, 2, Costs(forward=1, transfer=10)).spans
    assert spans[0][:2] == [Span(Action.parse("0F0"), 0, 1), Span(Action.parse("0F1"), 1, 2)]
    assert [(span.start, span.end) for span in spans[1]] == [(11, 12), (12, 13), (13, 15), (15, 17)]
    assert [(span.start, span.end) for span in spans[0][2:]] == [(25, 27), (27, 29)]


def test_within_a_rank_nothing_is_transferred() -> None:
    one_rank = parse_order(["0F0 1F0 1B0 0B0"])
    assert simulate(one_rank, 2, Costs(transfer=100)).makespan == 6
    assert run("naive", 2, 1, Costs(transfer=100)).makespan == 206


def test_split_backward_by_hand() -> None:
    """The stage before waits for I only; W fills what was a bubble.

    tick    0 1 2 3 4 5 6 7
    rank 0  F0F1. I0W0I1W1      1 1 1 1 1 1 each
    rank 1  . F0I0F1I1W0W1
    """
    spans = simulate(SPLIT, 2, Costs()).spans
    assert [span.start for span in spans[0]] == [0, 1, 3, 4, 5, 6]
    assert [span.start for span in spans[1]] == [1, 2, 3, 4, 5, 6]


def test_interleaved_by_hand() -> None:
    timeline = simulate(INTERLEAVED, 4, Costs(1, 1, 1))
    starts = {str(span.action): span.start for row in timeline.spans for span in row}
    assert starts["1F0"] == 1
    assert starts["2F0"] == 2
    assert starts["3F0"] == 3
    assert starts["3B0"] == 4
    assert starts["2B0"] == 6
    assert starts["3B1"] == 7
    assert starts["1B0"] == 9
    assert timeline.makespan == 15
    assert timeline.peak_in_flight == [4, 3]


def test_stages_that_share_a_rank_by_hand() -> None:
    timeline = simulate(LOOP, 4, Costs(1, 1, 1, transfer=1))
    starts = {str(span.action): span.start for row in timeline.spans for span in row}
    assert starts["1F0"] == 2  # another rank: one of transfer
    assert starts["2F0"] == 3  # the same rank: none
    assert starts["3F0"] == 5
    assert starts["2B0"] == 8  # waits for 3I0, not for 3W0
    assert starts["1I0"] == 10  # waits for the whole 2B0


def test_half_costs_are_exact_and_floats_stay_floats() -> None:
    tenth = Fraction(1, 10)
    assert run("1f1b", 4, 8, Costs(tenth, tenth, tenth)).makespan == Fraction(33, 10)
    assert run("1f1b", 4, 8, Costs(0.5, 0.5, 0.5)).makespan == 16.5


@pytest.mark.parametrize("seed", range(40))
def test_the_simulator_agrees_with_a_slow_one(seed: int) -> None:
    """Written apart: every action's end by recursion over what `dependencies` says."""
    rng = random.Random(seed)
    name = rng.choice(schedule_names())
    p, m, v = rng.randint(1, 5), rng.randint(1, 7), {"interleaved_1f1b": 3, "zb_v": 2}.get(name, 1)
    number = rng.choice(
        [lambda: rng.randint(0, 5), rng.random, lambda: Fraction(1, rng.randint(1, 9))]
    )
    stages = v * p
    costs = Costs(*([number() for _ in range(stages)] for _ in range(3)), transfer=number())
    order = make_schedule(name, stages, m, p).order
    cost = costs.per_stage(stages)
    ranks = {action: rank for rank, row in enumerate(order) for action in row}
    before = {after: one for row in order for one, after in pairwise(row)}
    named = {result_name(action): action for action in ranks}

    @cache
    def end(action: Action) -> int | float | Fraction:
        start = end(before[action]) if action in before else 0
        for need in dependencies(action, stages):
            maker = named[need]
            travel = costs.transfer if ranks[maker] != ranks[action] else 0
            start = max(start, end(maker) + travel)
        return start + cost[action.kind][action.stage]

    for row in simulate(order, stages, costs).spans:
        assert [span.end for span in row] == [end(span.action) for span in row]


def test_times_that_do_not_fit_in_64_bits_are_still_exact() -> None:
    huge = Fraction(10**30, 7)
    timeline = run("1f1b", 3, 4, Costs(huge, huge, huge))
    assert timeline.makespan == 18 * huge
    assert timeline.busy == 36 * huge


def test_peak_bytes() -> None:
    timeline = run("1f1b", 3, 5)
    assert timeline.peak_bytes(10, 3) == [30, 20, 10]
    assert timeline.peak_bytes([1, 10, 100], 3) == [3, 20, 100]
    # Stages 0 and 3 are on rank 0: 0F0 3F0 3I0 3W0 0F1 3F1 3B1 0B0 …
    assert simulate(LOOP, 4, Costs()).peak_bytes([100, 10, 1, 7], 4) == [207, 11]
    with pytest.raises(UsageError, match="for each of 3 stages, not \\[1, 2\\]"):
        timeline.peak_bytes([1, 2], 3)


def test_a_timeline_of_measured_spans() -> None:
    spans = [Span(Action.parse("0F0"), 0.5, 1.5), Span(Action.parse("0B0"), 2.0, 4.0)]
    timeline = Timeline([spans, []])
    assert list(timeline.spans[0]) == spans
    assert (timeline.makespan, timeline.busy, timeline.bubble) == (4.0, 3.0, 0.625)
    assert timeline.peak_in_flight == [1, 0]
    assert Timeline([]).makespan == 0


def test_rounding_makes_no_bubble_of_less_than_nothing() -> None:
    """0.1 + 0.2 == 0.30000000000000004: such sums were a bubble of -0.0 %."""
    ends = [0.1, 0.2, 0.1 + 0.2, 0.4]
    for count in range(1, 5):
        spans = [
            Span(Action(0, Kind.F, number), start, end)
            for number, (start, end) in enumerate(pairwise([0.0, *ends[:count]]))
        ]
        assert Timeline([spans]).bubble == pytest.approx(0, abs=1e-15)
        assert Timeline([spans]).bubble >= 0


def test_nothing_costs_nothing() -> None:
    timeline = run("gpipe", 2, 2, Costs(0, 0, 0))
    assert (timeline.makespan, timeline.bubble) == (0, 0.0)
    assert "nothing to draw" in draw(timeline)


@pytest.mark.parametrize(
    ("costs", "says"),
    [
        (Costs(forward=-1), "the forward cost is -1"),
        (Costs(backward_input=float("nan")), "the backward_input cost is nan"),
        (Costs(backward_weight=[1, -2]), "the backward_weight cost is -2"),
        (Costs(transfer=float("inf")), "the transfer cost is inf"),
        (Costs(forward=[1, 2, 3]), "forward costs are for 3 stages, but there are 2"),
    ],
)
def test_costs_that_cannot_be(costs: Costs, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run("gpipe", 2, 2, costs)


@pytest.mark.parametrize(
    "rows", [["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"], ["0F0 0W0 0I0", "1F0 1B0"], ["0B0 0F0"]]
)
def test_an_order_that_never_ends_is_refused(rows: list[str]) -> None:
    with pytest.raises(ScheduleError, match="never ends"):
        simulate(parse_order(rows), 2, Costs())


@pytest.mark.parametrize(("order", "stages"), BY_HAND.values(), ids=BY_HAND)
def test_a_rank_does_one_thing_at_a_time_in_its_order(order: Order, stages: int) -> None:
    timeline = simulate(order, stages, Costs(2, 3, 1, transfer=1))
    assert [[span.action for span in row] for row in timeline.spans] == order
    for row in timeline.spans:
        assert all(one.end <= after.start for one, after in pairwise(row))


# The drawing


def test_the_grid_of_1f1b() -> None:
    assert draw(run("1f1b", 2, 3)).splitlines() == [
        "tick    0  1  2  3  4  5  6  7  8  9  10 11",
        "rank 0  F0 F1 .  .  B0--- F2 B1--- .  B2---",
        "rank 1  .  F0 B0--- F1 B1--- F2 B2--- .  .",
        "",
        "F0 forward of microbatch 0; B0 backward of microbatch 0; . idle; one tick = 1",
    ]


def test_several_stages_on_a_rank_are_named_in_the_cell() -> None:
    text = draw(simulate(LOOP, 4, Costs()))
    assert text.splitlines()[1].startswith("rank 0  0F0 .   .   3F0 3I0 3W0 0F1")
    assert "0I1 input gradient of microbatch 1, stage 0" in " ".join(text.split())


def test_one_tick_is_the_largest_that_fits_all() -> None:
    half = Fraction(1, 2)
    text = draw(run("1f1b", 2, 3, Costs(half, half, half)))
    assert text.splitlines()[:3] == draw(run("1f1b", 2, 3)).splitlines()[:3]
    assert "one tick = 0.5" in text
    assert "rank 0  F0--- F1--- .  " in draw(run("1f1b", 2, 3, Costs(2, 3, 0)))


def test_ticks_too_fine_for_a_grid_are_rounded_and_said_so() -> None:
    text = draw(run("gpipe", 2, 2, Costs(1, 1, 1, transfer=Fraction(1, 1000))))
    assert "one tick = 0.5, rounded" in text
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "rounded" in draw(run("gpipe", 2, 2, Costs(0.1, 0.2, 0.3)))


@pytest.mark.parametrize("width", [24, 40, 80, 120])
@pytest.mark.parametrize(("name", "p", "m"), [("naive", 4, 8), ("1f1b", 12, 11), ("gpipe", 1, 1)])
def test_never_wider_than_asked_and_nothing_is_lost(name: str, p: int, m: int, width: int) -> None:
    timeline = run(name, p, m)
    text = draw(timeline, width)
    grid = text[: text.rindex("\n\n")]
    assert max(len(line) for line in grid.splitlines()) <= width
    if "not drawn" not in text:
        rank0 = "".join(line[len("rank 0") :] for line in grid.splitlines() if "rank 0 " in line)
        assert rank0.count("F") == rank0.count("B") == m


def test_a_space_is_given_up_before_a_second_band() -> None:
    wide, narrow = draw(run("1f1b", 4, 8), 107), draw(run("1f1b", 4, 8), 80)
    assert wide.count("rank 0") == narrow.count("rank 0") == 1
    assert "rank 0  F0 F1 F2 F3 .  " in wide
    assert "rank 0  F0F1F2F3. . . . . . B0--F4B1--F5" in narrow
    assert draw(run("1f1b", 4, 8), 60).count("rank 0") == 2


def test_a_very_long_grid_is_cut_with_a_sentence() -> None:
    text = draw(run("gpipe", 2, 2000), 80)
    assert "of 6003 ticks are not drawn)" in text
    assert len(text.splitlines()) < 60
