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

from itertools import pairwise

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Kind, Order
from barepp.program.dependencies import dependencies
from barepp.program.dry_run import dry_run

Cell = tuple[int, int]  # (rank, position in that rank's list)
Cells = dict[Action, Cell]  # where each action stands

MAX_ACTIONS = 200_000  # of an order, counting an F and a B for each stage and microbatch

# How much of a long order an error shows around the wrong cell.
_COLUMNS_AROUND = 5
_RANKS_AROUND = 8


def validate(order: Order, num_stages: int, num_microbatches: int) -> None:
    """Return if `order` keeps every rule above; raise a ScheduleError that shows the wrong cell."""
    check_sizes(num_stages, num_microbatches)
    _check_names(order, num_stages, num_microbatches)
    holder = _check_one_rank_per_stage(order, num_stages)
    cells = _check_nothing_twice(order)
    _check_each_backward(order, cells, holder, num_microbatches)
    _check_accumulation(order, cells, num_stages, num_microbatches)
    _check_no_cycle(order, cells, num_stages)


def check_sizes(num_stages: int, num_microbatches: int) -> None:
    """Raise a ScheduleError unless there is at least one stage and microbatch, and not too many."""
    if num_stages < 1:
        raise ScheduleError(f"a pipeline needs at least 1 stage, not {num_stages}")
    if num_microbatches < 1:
        raise ScheduleError(f"a pipeline needs at least 1 microbatch, not {num_microbatches}")
    if (actions := 2 * num_stages * num_microbatches) > MAX_ACTIONS:
        raise ScheduleError(
            f"{num_stages} stages of {num_microbatches} microbatches have {actions} forwards and "
            f"backwards, an order may have {MAX_ACTIONS}: use fewer microbatches, the pattern "
            "repeats"
        )


def _check_names(order: Order, num_stages: int, num_microbatches: int) -> None:
    for rank, actions in enumerate(order):
        for position, (stage, _, microbatch) in enumerate(actions):
            if not 0 <= stage < num_stages:
                why = f"stage {stage} does not exist: the stages are 0 to {num_stages - 1}"
            elif not 0 <= microbatch < num_microbatches:
                why = (
                    f"microbatch {microbatch} does not exist: they are 0 to {num_microbatches - 1}"
                )
            else:
                continue
            raise _broken(order, 1, why, (rank, position))


def _check_one_rank_per_stage(order: Order, num_stages: int) -> dict[int, int]:
    """Rule 2; return which rank holds each stage."""
    holder: dict[int, Cell] = {}
    for rank, actions in enumerate(order):
        for position, action in enumerate(actions):
            other, first = holder.setdefault(action.stage, (rank, position))
            if other != rank:
                why = f"stage {action.stage} is already on rank {other} (position {first})"
                raise _broken(order, 2, why, (rank, position))
    missing = next((stage for stage in range(num_stages) if stage not in holder), None)
    if missing is not None:
        raise _broken(order, 2, f"no rank holds stage {missing} of {num_stages}")
    return {stage: rank for stage, (rank, _) in holder.items()}


def _check_nothing_twice(order: Order) -> Cells:
    """Rule 3, no action stands twice; return where each one stands."""
    cells: Cells = {}
    for rank, actions in enumerate(order):
        for position, action in enumerate(actions):
            if action in cells:
                why = f"{action} stands twice, first at position {cells[action][1]}"
                raise _broken(order, 3, why, (rank, position))
            cells[action] = rank, position
    return cells


def _check_each_backward(
    order: Order, cells: Cells, holder: dict[int, int], num_microbatches: int
) -> None:
    """Rules 3 and 4: each microbatch of each stage has F before B, or F before I before W."""
    for stage in sorted(holder):
        for microbatch in range(num_microbatches):
            actions = [Action(stage, kind, microbatch) for kind in Kind]
            at = {action: cells[action][1] for action in actions if action in cells}
            kinds = [action.kind for action in sorted(at, key=at.__getitem__)]
            if kinds not in ([Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W]):
                raise _wrong_backward(order, at, holder[stage], *actions)


def _wrong_backward(  # noqa: PLR0917
    order: Order,
    at: dict[Action, int],
    rank: int,
    forward: Action,
    full: Action,
    inputs: Action,
    weights: Action,
) -> ScheduleError:
    """Return what is wrong with a stage's four actions for a microbatch; `at` has those found."""
    if not at:
        why = f"{forward} is missing, and so is all of microbatch {forward.microbatch} on stage "
        return _broken(order, 3, f"{why}{forward.stage}")

    parts = [action for action in (inputs, weights) if action in at]
    if full in at and parts:
        one, other = sorted([full, parts[0]], key=at.__getitem__)
        why = f"{one} at position {at[one]} already does part of this backward"
        return _broken(order, 3, why, (rank, at[other]))

    lacking = ""
    if forward not in at:
        lacking = str(forward)
    elif full not in at and not parts:
        lacking = f"{full} (or {inputs} and {weights})"
    elif full not in at and len(parts) == 1:
        lacking = str(weights if inputs in parts else inputs)
    if lacking:
        return _broken(order, 3, f"{lacking} is missing", (rank, list(at.values())[-1]))

    before, after = next(pair for pair in pairwise(at) if at[pair[0]] > at[pair[1]])
    why = f"{after} stands before {before} (position {at[before]})"
    return _broken(order, 4, why, (rank, at[after]))


def _check_accumulation(order: Order, cells: Cells, num_stages: int, num_microbatches: int) -> None:
    for stage in range(num_stages):
        adds = [
            cells.get(Action(stage, Kind.B, microbatch)) or cells[Action(stage, Kind.W, microbatch)]
            for microbatch in range(num_microbatches)
        ]
        for (rank, one), (_, two) in pairwise(adds):
            if one > two:
                row = order[rank]
                why = f"{row[one]} stands after {row[two]}: weight gradients add up in microbatch "
                raise _broken(order, 5, f"{why}order", (rank, one))


def _check_no_cycle(order: Order, cells: Cells, num_stages: int) -> None:
    free = dict.fromkeys(Kind, [0] * num_stages)
    ended = [len(row) for row in dry_run(order, num_stages, free)]
    stuck = [rank for rank, actions in enumerate(order) if ended[rank] < len(actions)]
    if not stuck:
        return
    # Every stuck rank waits for an action that stands later on a stuck rank. So walking from any
    # of them along "waits for" must meet a rank for the second time; from there on it is the cycle.
    walk: dict[int, str] = {}
    rank = stuck[0]
    while rank not in walk:
        action = order[rank][ended[rank]]
        needed = (
            cells.get(need._replace(kind=Kind.B), cells.get(need))
            if need.kind is Kind.I
            else cells[need]
            for need in dependencies(action, num_stages)
        )
        other, position = next(cell for cell in needed if cell and cell[1] >= ended[cell[0]])
        walk[rank] = (
            f"rank {rank} at {action} waits for {order[other][position]}, "
            f"on rank {other} at position {position}"
        )
        rank = other
    cycle = list(walk)[list(walk).index(rank) :]
    why = "the ranks wait for each other: " + "; ".join(walk[rank] for rank in cycle)
    raise _broken(order, 6, why, *((rank, ended[rank]) for rank in cycle))


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
