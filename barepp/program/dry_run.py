"""Runs an order on paper: each action as soon as its rank is free and what it needs has arrived.

The validator asks whether it comes to an end, the simulator how long that takes: both take this one
road, once along every action, without search. A rank goes through its own list until something is
missing; then it sleeps under the name of the result that it misses, and is woken by it.
"""

from array import array
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from barepp.program.actions import Action, Kind
from barepp.program.dependencies import dependencies, result_name
from barepp.program.packed import KINDS, MICROBATCH_SHIFT, PLACE_MASK, PackedActions, place

Number: TypeAlias = int | float | Fraction
Column: TypeAlias = MutableSequence[Any]  # of numbers of one type: an array or a list

NEVER = -1  # no action ends before time 0


class DryRun(NamedTuple):
    """When each rank's actions started and ended; a rank that is stuck has fewer than it should."""

    starts: list[Column]
    ends: list[Column]


class _Job(NamedTuple):
    """What all microbatches of one stage and kind have in common.

    The results of a stage lie side by side in one long column, microbatch after microbatch: first
    all of the forwards, stage by stage, then all of the input gradients. So a result is found by
    the slot of the stage's first microbatch, plus the microbatch.
    """

    slot: int  # where the result goes; -1 if nobody ever waits for it
    cost: Number
    needs: tuple[tuple[int, Number], ...]  # where each need is found, and how long it travels


def dry_run(
    rows: Sequence[PackedActions],
    num_stages: int,
    cost: Mapping[Kind, Sequence[Number]],
    transfer: Number = 0,
    typecode: str = "q",
) -> DryRun:
    """Return when everything happens; `typecode` says what an array of the times holds.

    "q" is for integers below 2**63, "d" for floats, "" for anything else (and takes more memory).
    """
    num_microbatches = max((row.num_microbatches() for row in rows), default=0)
    jobs = _jobs(rows, num_stages, num_microbatches, cost, transfer)
    num_slots = 2 * num_stages * num_microbatches
    ended: Column = array(typecode, [NEVER]) * num_slots if typecode else [NEVER] * num_slots
    starts = [_column(typecode) for _ in rows]
    ends = [_column(typecode) for _ in rows]
    asleep: dict[int, Iterator[int]] = {}  # by the slot of the result that would wake it

    def walk(row: PackedActions, began: Column, finished: Column) -> Iterator[int]:
        """Go through one rank's list; yield the slot of what is missing, to be called again."""
        now: Number = 0
        for code in row.codes:
            microbatch = code >> MICROBATCH_SHIFT
            slot, takes, needs = jobs[code & PLACE_MASK]
            for need, travel in needs:
                if (arrived := ended[need + microbatch]) == NEVER:
                    yield need + microbatch
                    arrived = ended[need + microbatch]
                if arrived + travel > now:  # noqa: PLR1730  max() would take a third of the time
                    now = arrived + travel
            began.append(now)
            now += takes
            finished.append(now)
            if slot >= 0:
                ended[slot + microbatch] = now
                if slot + microbatch in asleep:
                    awake.append(asleep.pop(slot + microbatch))

    # A stack: who was woken last goes on first. Neighbours then work in turn on what is still in
    # the processor's caches; a queue would go round all ranks, and take half as long again.
    awake = list(map(walk, rows, starts, ends))[::-1]
    while awake:
        rank = awake.pop()
        for missing in rank:
            # At most one rank can be woken by a result: that of the neighbouring stage. A rank
            # that sleeps because of a later action of its own is never woken.
            asleep[missing] = rank
            break
    return DryRun(starts, ends)


def _column(typecode: str) -> Column:
    return array(typecode) if typecode else []


def _jobs(
    rows: Sequence[PackedActions],
    num_stages: int,
    num_microbatches: int,
    cost: Mapping[Kind, Sequence[Number]],
    transfer: Number,
) -> dict[int, _Job]:
    """Return the job of each stage and kind, by its `place`."""
    holder = {stage: rank for rank, row in enumerate(rows) for stage in row.stages()}

    def slot(result: Action) -> int:
        behind_the_forwards = 0 if result.kind is Kind.F else num_stages
        return (behind_the_forwards + result.stage) * num_microbatches

    jobs = {}
    for stage, rank in holder.items():
        for kind in KINDS:
            action = Action(stage, kind, 0)
            needs = tuple(
                (slot(need), 0 if holder.get(need.stage) == rank else transfer)
                for need in dependencies(action, num_stages)
            )
            target = -1 if kind is Kind.W else slot(result_name(action))
            jobs[place(stage, kind)] = _Job(target, cost[kind][stage], needs)
    return jobs
