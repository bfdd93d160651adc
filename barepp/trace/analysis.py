"""What a trace comes to: each rank's times, a timeline of one step, and who hid whose messages."""

from __future__ import annotations

import dataclasses
import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from barepp.errors import DataError, ScheduleError, UsageError
from barepp.plan.chart_layout import Arrow, Interval
from barepp.plan.simulate import Costs, simulate
from barepp.plan.timeline import Timeline
from barepp.program.actions import Kind
from barepp.program.dry_run import Span
from barepp.program.lowering import Step
from barepp.schedules import Schedule
from barepp.trace.chrome_format import ActionSpan, RankTrace, Trace, messages
from barepp.trace.recorder import Note, step_times
from barepp.trace.step_breakdown import RankTimes, mean_times


def counted_steps(trace: Trace) -> list[int]:
    """Return the steps that every rank has recorded, the first left out if others are there."""
    recorded = [{step.number for step in rank.steps} for rank in trace.ranks]
    common = sorted(set.intersection(*recorded)) if recorded else []
    return common[1:] or common


def typical_step(trace: Trace) -> int:
    """Return the step that took the median time, of those that count."""
    took: dict[int, int] = defaultdict(int)
    for rank in trace.ranks:
        for number, start, end in rank.steps:
            took[number] = max(took[number], end - start)
    steps = sorted(counted_steps(trace), key=lambda number: took[number])
    if not steps:
        raise UsageError("this trace has no step that all ranks have recorded")
    return steps[(len(steps) - 1) // 2]


# -- one step as a timeline -----------------------------------------------------------------------


class Measured(NamedTuple):
    """One step, in milliseconds since the start of its first action."""

    number: int
    timeline: Timeline
    waits: list[list[Interval]]  # of each rank, for its actions' inputs
    arrows: list[Arrow]  # of its messages


def measured(trace: Trace, step: int) -> Measured:
    """Return what ran when, from the start of the step's first action to the end of its last."""
    rows = [_of_step(rank, step) for rank in trace.ranks]
    if not any(rows):
        there = sorted({one.number for rank in trace.ranks for one in rank.steps})
        what = f"{there[0]} to {there[-1]}" if there else "none"
        raise UsageError(f"the trace has no step {step}; there are: {what}")
    origin = min(span.start for row in rows for span in row)

    def ms(time_ns: int) -> float:
        return (time_ns - origin) / 1e6

    return Measured(
        step,
        Timeline([Span(s.action, ms(s.start), ms(s.end)) for s in row] for row in rows),
        [[(ms(s.asked), ms(s.start)) for s in row if s.source is not None] for row in rows],
        [
            Arrow(sender, ms(sent.end), receiver, ms(used.start))
            for sender, sent, receiver, used in messages(trace)
            if used.step == step
        ],
    )


def _of_step(rank: RankTrace, step: int) -> list[ActionSpan]:
    return [span for span in rank.actions if span.step == step]


def schedule_of(trace: Trace, step: int) -> Schedule:
    """Return what the step ran: with fewer microbatches than planned if it had too few rows.

    Raises:
        DataError: some of such a step's actions are not there.
    """
    order = [[span.action for span in _of_step(rank, step)] for rank in trace.ranks]
    count = 1 + max((action.microbatch for row in order for action in row), default=-1)
    if count == trace.schedule.num_microbatches:
        return trace.schedule
    try:
        return dataclasses.replace(trace.schedule, num_microbatches=count, order=order)
    except ScheduleError as error:
        what = str(error).splitlines()[0]
        raise DataError(f"of step {step} the trace does not have every action: {what}") from error


def predicted(trace: Trace, schedule: Schedule) -> Timeline:
    """Return what the simulator says when each action costs what it took, in the median; in ms.

    Transfers cost nothing, and every rank has a core: what is missing from this is the price of
    both.
    """
    return simulate(schedule.order, schedule.num_stages, measured_costs(trace))


def measured_costs(trace: Trace) -> Costs:
    """Return the median of what each kind of action took on each stage, in milliseconds."""
    steps = set(counted_steps(trace))
    took: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for rank in trace.ranks:
        for span in rank.actions:
            if span.step in steps:
                stage, kind, _ = span.action
                took[stage, kind].append((span.end - span.start) / 1e6)
    median = {place: statistics.median(times) for place, times in took.items()}
    stages = range(trace.schedule.num_stages)
    whole = [median.get((stage, Kind.B), 0.0) for stage in stages]
    return Costs(
        forward=[median.get((stage, Kind.F), 0.0) for stage in stages],
        # Where a backward was never split, any two parts that add up to it will do.
        backward_input=[median.get((s, Kind.I), whole[s] / 2) for s in stages],
        backward_weight=[median.get((s, Kind.W), whole[s] / 2) for s in stages],
    )


# -- sums over the steps --------------------------------------------------------------------------


def rank_times(trace: Trace) -> list[RankTimes]:
    """Return the mean of a step on each rank."""
    steps = set(counted_steps(trace))
    return [_rank_times(rank, steps) for rank in trace.ranks]


def _rank_times(rank: RankTrace, steps: Collection[int]) -> RankTimes:
    actions: dict[int, list[ActionSpan]] = defaultdict(list)
    notes: dict[int | None, list[Note]] = defaultdict(list)
    for span in rank.actions:
        actions[span.step].append(span)
    for note in rank.notes:
        notes[note.step].append(Note(*note[1:]))
    sums = [
        step_times(
            end - start,
            [Step(span.action, span.source, span.to) for span in actions[number]],
            [(span.asked, span.start, span.end, span.gave) for span in actions[number]],
            notes[number],
        )
        for number, start, end in rank.steps
        if number in steps
    ]
    counted = [span for number in sorted(steps) for span in actions[number]]
    return mean_times(sums, _peak_in_flight(counted), rank.peak_memory_nbytes)


def _peak_in_flight(actions: Sequence[ActionSpan]) -> int:
    row = [Span(span.action, span.start, span.end) for span in actions]
    [peak] = Timeline([row]).peak_in_flight
    return peak


def outside_ms(trace: Trace) -> dict[str, float]:
    """Return for each span between steps, by name, how long it took in the mean, in ms."""
    took: dict[str, list[float]] = defaultdict(list)
    for rank in trace.ranks:
        for note in rank.notes:
            if note.step is None:
                took[note.name].append((note.end - note.start) / 1e6)
    return {name: statistics.mean(times) for name, times in took.items()}


class Transfers(NamedTuple):
    """How long messages were on their way, from the call of isend until the receiver had all of it.

    `hidden_ns` is that part of it in which the receiver computed; `awaited_ns` that in which it
    waited for this very message. What is left went into neither: the receiver waited for another
    message, or was busy sending.
    """

    messages: int
    total_ns: int
    hidden_ns: int
    awaited_ns: int


def transfers(trace: Trace) -> Transfers:
    """Return the sums over all messages of the steps that count."""
    steps = set(counted_steps(trace))
    computing = [_Computing(rank) for rank in trace.ranks]
    count = total = hidden = awaited = 0
    for _, sent, receiver, used in messages(trace):
        if used.step not in steps:
            continue
        # Of clocks that are compared over a network the last microseconds are not known.
        arrived = max(sent.end, used.arrived)
        count += 1
        total += arrived - sent.end
        hidden += computing[receiver].within(sent.end, arrived)
        awaited += max(0, min(used.start, arrived) - max(used.asked, sent.end))
    return Transfers(count, total, hidden, awaited)


class Copies(NamedTuple):
    """What the transport copied on GPUs, and how much of that time the same rank computed."""

    copies: int
    nbytes: int
    total_ns: int
    hidden_ns: int


def copies(trace: Trace) -> Copies:
    """Return the sums over all copies of the steps that count."""
    steps = set(counted_steps(trace))
    found: list[tuple[int, int, int]] = []
    for rank in trace.ranks:
        within = [(step.start, step.end) for step in rank.steps if step.number in steps]
        computing = _Computing(rank)
        found += [
            (copy.nbytes, copy.end - copy.start, computing.within(copy.start, copy.end))
            for copy in rank.copies
            if any(start <= copy.start < end for start, end in within)
        ]
    nbytes, total, hidden = (sum(one[part] for one in found) for part in range(3))
    return Copies(len(found), nbytes, total, hidden)


class _Computing:
    """When one rank computed; its actions do not overlap."""

    def __init__(self, rank: RankTrace) -> None:
        spans = sorted((span.start, span.end) for span in rank.actions)
        self._starts = [start for start, _ in spans]
        self._ends = [end for _, end in spans]

    def within(self, start: int, end: int) -> int:
        """Return how much of the time from start to end it computed."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        return sum(
            min(self._ends[i], end) - max(self._starts[i], start) for i in range(first, last)
        )
