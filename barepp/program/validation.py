"""Refuses an order that cannot run or would not be exact, showing the cell that is wrong.

The rules, checked in this order (a message names the rule that it found broken):

1. Every action names a stage in 0 … num_stages-1 and a microbatch in 0 … num_microbatches-1.
2. All actions of one stage stand on one rank (the stage's weights live there and nowhere else).
3. Each stage and microbatch has exactly one F, and either exactly one B or exactly one I and one W.
4. On its rank, F stands before B or I, and I before W.
5. Each stage makes its weight gradients (B or W) in microbatch order: floating-point addition is
   not associative, so another order of accumulation would give other bits than one process.
6. The ranks never all wait for each other: following "waits for" never leads back to the start.

Not a rule: the order of the forwards. Messages are matched by tag, so any order of F will do.
Everything here is linear in the number of actions.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import lt

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Kind, Order
from barepp.program.dependencies import dependencies
from barepp.program.dry_run import dry_run
from barepp.program.packed import (
    KIND_BITS,
    KIND_MASK,
    KINDS,
    MICROBATCH_SHIFT,
    PLACE_MASK,
    PackedActions,
    packed,
)

Cell = tuple[int, int]  # (rank, position in that rank's list)

# How much of a long order an error shows around the wrong cell.
_COLUMNS_AROUND = 5
_RANKS_AROUND = 8


def validate(order: Order, num_stages: int, num_microbatches: int) -> None:
    """Return if `order` keeps every rule above; raise a ScheduleError that shows the wrong cell."""
    check_sizes(num_stages, num_microbatches)
    _check_names(order, num_stages, num_microbatches)
    rows = [packed(actions) for actions in order]
    holder = _check_one_rank_per_stage(rows, num_stages)
    found = _check_nothing_twice(rows, holder, num_microbatches)
    _check_each_backward(found)
    _check_accumulation(found)
    _check_no_cycle(found)


def check_sizes(num_stages: int, num_microbatches: int) -> None:
    """Raise a ScheduleError unless there is at least one stage and one microbatch."""
    if num_stages < 1:
        raise ScheduleError(f"a pipeline needs at least 1 stage, not {num_stages}")
    if num_microbatches < 1:
        raise ScheduleError(f"a pipeline needs at least 1 microbatch, not {num_microbatches}")


def _check_names(order: Order, num_stages: int, num_microbatches: int) -> None:
    for rank, actions in enumerate(order):
        if isinstance(actions, PackedActions) and (
            max(actions.stages(), default=0) < num_stages
            and actions.num_microbatches() <= num_microbatches
        ):
            continue
        for position, (stage, _, microbatch) in enumerate(actions):
            cell = rank, position
            if not 0 <= stage < num_stages:
                why = f"stage {stage} does not exist: the stages are 0 to {num_stages - 1}"
                raise _broken(order, 1, why, cell)
            if not 0 <= microbatch < num_microbatches:
                why = (
                    f"microbatch {microbatch} does not exist: they are 0 to {num_microbatches - 1}"
                )
                raise _broken(order, 1, why, cell)


def _check_one_rank_per_stage(rows: Sequence[PackedActions], num_stages: int) -> dict[int, int]:
    """Rule 2; return which rank holds each stage."""
    holder: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for stage in row.stages():
            if stage in holder:
                first, again = (
                    next(i for i, action in enumerate(rows[r]) if action.stage == stage)
                    for r in (holder[stage], rank)
                )
                why = f"stage {stage} is already on rank {holder[stage]} (position {first})"
                raise _broken(rows, 2, why, (rank, again))
            holder[stage] = rank
    missing = next((stage for stage in range(num_stages) if stage not in holder), None)
    if missing is not None:
        raise _broken(rows, 2, f"no rank holds stage {missing} of {num_stages}")
    return holder


@dataclass(frozen=True)
class _Found:
    """The lists, and where in them each action was found."""

    rows: Sequence[PackedActions]
    holder: dict[int, int]  # which rank holds a stage
    num_microbatches: int
    # For each kind, in the order of `Kind`, the positions of all its actions, -1 for nowhere: the
    # microbatches of stage 0, then those of stage 1, and so on.
    positions: "tuple[array[int], ...]"

    def cell_of_result(self, name: Action) -> Cell:
        """Return where the action stands that others wait for under this `result_name`."""
        index = name.stage * self.num_microbatches + name.microbatch
        kinds = (Kind.F,) if name.kind is Kind.F else (Kind.B, Kind.I)
        position = max(self.positions[KINDS.index(kind)][index] for kind in kinds)
        return self.holder[name.stage], position


def _check_nothing_twice(
    rows: Sequence[PackedActions], holder: dict[int, int], num_microbatches: int
) -> _Found:
    """Rule 3, no action stands twice; return where each one stands."""
    positions = tuple(array("q", [-1]) * (len(holder) * num_microbatches) for _ in KINDS)
    for rank, row in enumerate(rows):
        columns = {
            place: (positions[place & KIND_MASK], (place >> KIND_BITS) * num_microbatches)
            for place in row.places()
        }
        for position, code in enumerate(row.codes):
            column, first = columns[code & PLACE_MASK]
            index = first + (code >> MICROBATCH_SHIFT)
            if column[index] >= 0:
                why = f"{row[position]} stands twice, first at position {column[index]}"
                raise _broken(rows, 3, why, (rank, position))
            column[index] = position
    return _Found(rows, holder, num_microbatches, positions)


def _check_each_backward(found: _Found) -> None:
    """Rules 3 and 4: each microbatch of each stage has F before B, or F before I before W."""
    for index, (forward, full, inputs, weights) in enumerate(zip(*found.positions, strict=True)):
        whole = inputs == weights == -1 < forward < full
        split = full == -1 < forward < inputs < weights
        if not whole and not split:
            raise _wrong_backward(found, *divmod(index, found.num_microbatches))


def _wrong_backward(found: _Found, stage: int, microbatch: int) -> ScheduleError:
    """Return what is wrong with the four actions of this stage and microbatch."""
    index = stage * found.num_microbatches + microbatch
    actions = [Action(stage, kind, microbatch) for kind in KINDS]
    at = {action: column[index] for action, column in zip(actions, found.positions, strict=True)}
    rank = found.holder[stage]
    present = [action for action in actions if at[action] >= 0]
    if not present:
        why = f"{actions[0]} is missing, and so is all of microbatch {microbatch} on stage {stage}"
        return _broken(found.rows, 3, why)

    forward, full, inputs, weights = actions
    parts = [action for action in (inputs, weights) if action in present]
    if full in present and parts:
        one, other = sorted([full, parts[0]], key=lambda action: at[action])
        why = f"{one} at position {at[one]} already does part of this backward"
        return _broken(found.rows, 3, why, (rank, at[other]))

    lacking = ""
    if forward not in present:
        lacking = str(forward)
    elif full not in present and not parts:
        lacking = f"{full} (or {inputs} and {weights})"
    elif full not in present and len(parts) == 1:
        lacking = str(weights if inputs in parts else inputs)
    if lacking:
        return _broken(found.rows, 3, f"{lacking} is missing", (rank, at[present[-1]]))

    before, after = next(pair for pair in pairwise(present) if at[pair[0]] > at[pair[1]])
    why = f"{after} stands before {before} (position {at[before]})"
    return _broken(found.rows, 4, why, (rank, at[after]))


def _check_accumulation(found: _Found) -> None:
    _, full, _, weights = found.positions
    for stage, rank in found.holder.items():
        first = stage * found.num_microbatches
        here = slice(first, first + found.num_microbatches)
        adds = list(map(max, full[here], weights[here]))  # B or W: the other one is at -1
        if not all(map(lt, adds, adds[1:])):
            one, two = next(pair for pair in pairwise(adds) if pair[0] > pair[1])
            row = found.rows[rank]
            why = f"{row[one]} stands after {row[two]}: weight gradients add up in microbatch order"
            raise _broken(found.rows, 5, why, (rank, one))


def _check_no_cycle(found: _Found) -> None:
    rows, num_stages = found.rows, len(found.holder)
    ended = [
        len(ends) for ends in dry_run(rows, num_stages, dict.fromkeys(KINDS, [0] * num_stages)).ends
    ]
    stuck = [rank for rank, row in enumerate(rows) if ended[rank] < len(row)]
    if not stuck:
        return
    # Every stuck rank waits for an action that stands later on a stuck rank. So walking from any
    # of them along "waits for" must meet a rank for the second time; from there on it is the cycle.
    walk: dict[int, str] = {}
    rank = stuck[0]
    while rank not in walk:
        action = rows[rank][ended[rank]]
        cells = map(found.cell_of_result, dependencies(action, num_stages))
        holder, place = next(cell for cell in cells if cell[1] >= ended[cell[0]])
        missing = rows[holder][place]
        walk[rank] = (
            f"rank {rank} at {action} waits for {missing}, on rank {holder} at position {place}"
        )
        rank = holder
    cycle = list(walk)[list(walk).index(rank) :]
    why = "the ranks wait for each other: " + "; ".join(walk[rank] for rank in cycle)
    raise _broken(rows, 6, why, *((rank, ended[rank]) for rank in cycle))


def _broken(order: Order, rule: int, why: str, *cells: Cell) -> ScheduleError:
    """Return the error: rule, first cell, sentence, and the lists with every cell marked [2B1]."""
    where = ""
    if cells:
        rank, position = cells[0]
        where = f" at rank {rank}, position {position} ({order[rank][position]})"
    return ScheduleError(
        f"invalid order, rule {rule} broken{where}: {why}\n{_marked_lists(order, cells)}"
    )


def _marked_lists(order: Order, cells: tuple[Cell, ...]) -> str:
    if not order:
        return "  (no rank has anything to do)"
    middle_rank, middle = cells[0] if cells else (0, 0)
    ranks = range(
        max(0, middle_rank - _RANKS_AROUND), min(len(order), middle_rank + _RANKS_AROUND + 1)
    )
    start, stop = max(0, middle - _COLUMNS_AROUND), middle + _COLUMNS_AROUND + 1
    shown = {rank: list(enumerate(order[rank][start:stop], start)) for rank in ranks}
    width = max((len(str(a)) for row in shown.values() for _, a in row), default=0) + 2
    lines = []
    for rank, row in shown.items():
        words = [f"[{a}]" if (rank, position) in cells else f" {a} " for position, a in row]
        before = "... " if start > 0 else ""
        after = " ..." if stop < len(order[rank]) else ""
        lines.append(
            f"  rank {rank:<3} {before}{' '.join(w.ljust(width) for w in words)}{after}".rstrip()
        )
    if len(ranks) < len(order):
        lines.append(f"  ({len(order) - len(ranks)} of {len(order)} ranks not shown)")
    return "\n".join(lines)
