"""What is read off a trace is what the simulator that made it knows."""

from __future__ import annotations

import pytest
from traces import MS, every_shape, made

from barepp.errors import DataError, UsageError
from barepp.plan.simulate import Costs, simulate
from barepp.plan.timeline import time_in
from barepp.program.actions import Action
from barepp.schedules import make_schedule
from barepp.trace.analysis import (
    counted_steps,
    measured,
    outside_ms,
    predicted,
    rank_times,
    schedule_of,
    transfers,
    typical_step,
)
from barepp.trace.chrome_format import ActionSpan, NoteSpan, RankTrace, StepSpan, Trace
from barepp.trace.step_breakdown import RankTimes


@every_shape
@pytest.mark.parametrize("transfer", [0, 3])
def test_a_step_is_what_was_simulated(shape, transfer):
    trace = made(*shape, transfer=transfer)
    expected = simulate(trace.schedule.order, trace.schedule.num_stages, Costs(transfer=transfer))
    real = measured(trace, 1).timeline
    assert [list(row) for row in real.spans] == [list(row) for row in expected.spans]
    assert real.bubble == pytest.approx(expected.bubble)
    # The prediction is without transfers, whatever they took.
    assert predicted(trace, schedule_of(trace, 1)).makespan == pytest.approx(
        float(simulate(trace.schedule.order, trace.schedule.num_stages, Costs()).makespan)
    )


def test_what_is_left_of_a_step_is_its_own():
    waits_ms = [(0, "activations", 2.0), (1, "gradients", 1.0)]
    times = RankTimes(20.0, 8.0, waits_ms, 4.0, 0.5, 8, 2, 0)
    assert (times.waiting_ms, times.communicating_ms) == (3.0, 4.5)
    assert (times.own_ms, times.moving_ms) == (4.5, 8.5)


@every_shape
def test_the_parts_of_a_step_add_up(shape):
    trace = made(*shape, transfer=2, sending=MS // 4)
    expected = simulate(trace.schedule.order, trace.schedule.num_stages, Costs(transfer=2))
    for rank, times in enumerate(rank_times(trace)):
        row = trace.schedule.order[rank]
        assert times.step_ms == expected.makespan
        assert times.actions == len(row)
        busy = float(time_in(expected.spans[rank]))
        assert times.computing_ms + times.sending_ms == pytest.approx(busy)
        assert times.peak_in_flight == expected.peak_in_flight[rank]
        total = times.computing_ms + times.communicating_ms + times.waiting_ms + times.own_ms
        assert total == pytest.approx(times.step_ms)
        waited = sum(span.start - span.asked for span in trace.ranks[rank].actions[len(row) :])
        assert times.waiting_ms == pytest.approx(waited / MS)


def by_hand() -> Trace:
    """Two ranks, one microbatch; times in µs.

    rank 0:  0F0 0..10  send 10..12                         waits 12..40   0B0 40..60
    rank 1:             waits 0..15  1F0 15..25  1B0 25..35  send 35..36
    The activation arrives at 14, the gradient at 39.
    """
    schedule = make_schedule("1f1b", 2, 1)
    f0, b0 = Action.parse("0F0"), Action.parse("0B0")
    f1, b1 = Action.parse("1F0"), Action.parse("1B0")
    first = [
        ActionSpan(0, f0, None, 1, 0, 0, 0, 10, 12),
        ActionSpan(0, b0, 1, None, 12, 39, 40, 60, 60),
    ]
    second = [
        ActionSpan(0, f1, 0, None, 0, 14, 15, 25, 25),
        ActionSpan(0, b1, None, 0, 25, 25, 25, 35, 36),
    ]
    notes = [NoteSpan(0, "waiting for the loss", 1, 60, 63), NoteSpan(None, "mine", None, 70, 80)]
    flush = [
        NoteSpan(0, "waiting for its sends", None, 36, 40),
        NoteSpan(0, "sharing the loss", None, 40, 41),
    ]
    ranks = [
        RankTrace([StepSpan(0, 0, 64)], first, notes, 0),
        RankTrace([StepSpan(0, 0, 45)], second, flush, 0),
    ]
    for rank in ranks:  # microseconds to nanoseconds
        rank.steps = [StepSpan(n, a * 1000, b * 1000) for n, a, b in rank.steps]
        rank.actions = [
            span._replace(**{f: getattr(span, f) * 1000 for f in span._fields[4:]})
            for span in rank.actions
        ]
        rank.notes = [n._replace(start=n.start * 1000, end=n.end * 1000) for n in rank.notes]
    return Trace(schedule, ranks, [0, 0])


def test_by_hand():
    first, second = rank_times(by_hand())
    us = 1e-3
    assert first.waits_ms == [(1, "gradients", pytest.approx(28 * us)), (1, "the loss", 3 * us)]
    assert (first.computing_ms, first.sending_ms) == (pytest.approx(30 * us), 2 * us)
    assert first.own_ms == pytest.approx((64 - 30 - 2 - 31) * us)
    assert second.waits_ms == [(0, "activations", pytest.approx(15 * us))]
    assert (second.sending_ms, second.flushing_ms) == (1 * us, pytest.approx(5 * us))
    assert outside_ms(by_hand()) == {"mine": pytest.approx(10 * us)}


def test_who_hid_a_transfer():
    """The activation travels 10..14 and is waited for; the gradient 35..39 as well."""
    trace = by_hand()
    assert transfers(trace) == (2, 8_000, 0, 8_000)
    # Were rank 0 computing something else until 38, that would hide three of the gradient's four.
    other = ActionSpan(
        0, Action.parse("0F0"), None, None, *[t * 1000 for t in (12, 12, 12, 38, 38)]
    )
    trace.ranks[0].actions.insert(1, other)
    trace.ranks[0].actions[2] = trace.ranks[0].actions[2]._replace(asked=38_000)
    assert transfers(trace) == (2, 8_000, 3_000, 5_000)


def test_a_transfer_is_hidden_exactly_where_the_receiver_computes():
    """With transfers as long as an action, each kind of share is some of the whole, and no more."""
    trace = made("1f1b", 4, 8, transfer=1)
    found = transfers(trace)
    assert found.messages == 2 * 3 * 8
    assert found.total_ns == found.messages * MS
    assert 0 < found.hidden_ns < found.total_ns
    assert 0 < found.awaited_ns < found.total_ns
    assert found.hidden_ns + found.awaited_ns <= found.total_ns
    assert transfers(made("1f1b", 4, 8)).total_ns == 0
    assert transfers(made("1f1b", 1, 8)).messages == 0


def test_the_first_step_warms_up_unless_it_is_the_only_one():
    assert counted_steps(made("gpipe", 2, 2, num_steps=3)) == [1, 2]
    assert counted_steps(made("gpipe", 2, 2, num_steps=1)) == [0]


def test_the_typical_step_is_of_median_length():
    trace = made("gpipe", 2, 2, num_steps=4)
    for rank in trace.ranks:
        for index, longer in enumerate((0, 5, 1, 3)):
            step = rank.steps[index]
            rank.steps[index] = step._replace(end=step.end + longer * MS)
    assert typical_step(trace) == 3


def test_a_step_with_too_few_rows_is_beside_a_plan_of_its_own_microbatches():
    """The pipeline's schedule has 8; a step of 3 rows ran 3, and is predicted to."""
    trace = made("1f1b", 2, 3)
    ran = trace.schedule
    trace.schedule = make_schedule("1f1b", 2, 8)
    found = schedule_of(trace, 1)
    assert found.num_microbatches == 3
    assert [list(row) for row in found.order] == [list(row) for row in ran.order]
    assert predicted(trace, found).makespan == pytest.approx(
        float(simulate(ran.order, 2, Costs()).makespan)
    )
    assert schedule_of(made("1f1b", 2, 8), 1) == trace.schedule
    trace.ranks[0].actions.pop()
    with pytest.raises(DataError, match="of step 1 the trace does not have every action") as caught:
        schedule_of(trace, 1)
    assert "\n" not in str(caught.value)


def test_a_step_that_is_not_there():
    with pytest.raises(UsageError, match="the trace has no step 9; there are: 0 to 1"):
        measured(made("gpipe", 2, 2), 9)
    trace = made("gpipe", 2, 2)
    trace.ranks[1].steps.clear()
    with pytest.raises(UsageError, match="no step that all ranks have recorded"):
        typical_step(trace)
