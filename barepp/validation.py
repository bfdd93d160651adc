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

from collections.abc import Iterator

from barepp.actions import Action, Kind, Order
from barepp.dependencies import dependencies, in_dependency_order, result_name
from barepp.errors import ScheduleError

Cell = tuple[int, int]  # (rank, position in that rank's list)

# How much of a long order an error shows around the wrong cell.
_COLUMNS_AROUND = 5
_RANKS_AROUND = 8


def validate(order: Order, num_stages: int, num_microbatches: int) -> None:
    """Return if `order` keeps every rule above; raise a ScheduleError that shows the wrong cell."""
    check_sizes(num_stages, num_microbatches)
    _check_names(order, num_stages, num_microbatches)
    _check_one_rank_per_stage(order, num_stages)
    cells = _check_each_once(order)
    _check_complete(order, cells, num_stages, num_microbatches)
    _check_order_on_rank(order, cells)
    _check_accumulation(order)
    _check_no_cycle(order, cells, num_stages)


def check_sizes(num_stages: int, num_microbatches: int) -> None:
    """Raise a ScheduleError unless there is at least one stage and one microbatch."""
    if num_stages < 1:
        raise ScheduleError(f"a pipeline needs at least 1 stage, not {num_stages}")
    if num_microbatches < 1:
        raise ScheduleError(f"a pipeline needs at least 1 microbatch, not {num_microbatches}")


def _cells(order: Order) -> Iterator[tuple[Cell, Action]]:
    for rank, actions in enumerate(order):
        for position, action in enumerate(actions):
            yield (rank, position), action


def _check_names(order: Order, num_stages: int, num_microbatches: int) -> None:
    for cell, (stage, _, microbatch) in _cells(order):
        if not 0 <= stage < num_stages:
            why = f"stage {stage} does not exist: the stages are 0 to {num_stages - 1}"
            raise _broken(order, 1, why, cell)
        if not 0 <= microbatch < num_microbatches:
            why = f"microbatch {microbatch} does not exist: they are 0 to {num_microbatches - 1}"
            raise _broken(order, 1, why, cell)


def _check_one_rank_per_stage(order: Order, num_stages: int) -> None:
    first_cell: dict[int, Cell] = {}
    for cell, action in _cells(order):
        first_rank, first_position = first_cell.setdefault(action.stage, cell)
        if cell[0] != first_rank:
            why = (
                f"stage {action.stage} is already on rank {first_rank} (position {first_position})"
            )
            raise _broken(order, 2, why, cell)
    missing = [stage for stage in range(num_stages) if stage not in first_cell]
    if missing:
        raise _broken(order, 2, f"no rank holds stage {missing[0]} of {num_stages}")


def _check_each_once(order: Order) -> dict[Action, Cell]:
    """Rule 3, too much: no action stands twice, and no backward is both whole and split."""
    cells: dict[Action, Cell] = {}
    for cell, action in _cells(order):
        if action in cells:
            why = f"{action} stands twice, first at position {cells[action][1]}"
            raise _broken(order, 3, why, cell)
        cells[action] = cell
        rivals = "IW" if action.kind is Kind.B else "B" if action.kind in (Kind.I, Kind.W) else ""
        for rival in (action._replace(kind=Kind(letter)) for letter in rivals):
            if rival in cells:
                why = f"{rival} at position {cells[rival][1]} already does part of this backward"
                raise _broken(order, 3, why, cell)
    return cells


def _check_complete(
    order: Order, cells: dict[Action, Cell], num_stages: int, num_microbatches: int
) -> None:
    """Rule 3, too little: F and (B, or I and W) are there for every stage and microbatch."""
    for stage in range(num_stages):
        for microbatch in range(num_microbatches):
            forward, full, inputs, weights = (Action(stage, kind, microbatch) for kind in Kind)
            if forward not in cells:
                lacking = f"{forward} is missing"
            elif full not in cells and inputs not in cells and weights not in cells:
                lacking = f"{full} (or {inputs} and {weights}) is missing"
            elif full not in cells and inputs not in cells:
                lacking = f"{inputs} is missing"
            elif full not in cells and weights not in cells:
                lacking = f"{weights} is missing"
            else:
                continue
            present = [a for a in (forward, full, inputs, weights) if a in cells]
            near = [cells[present[-1]]] if present else []
            alone = (
                "" if present else f", and so is all of microbatch {microbatch} on stage {stage}"
            )
            raise _broken(order, 3, lacking + alone, *near)


def _check_order_on_rank(order: Order, cells: dict[Action, Cell]) -> None:
    first_needs = {Kind.B: Kind.F, Kind.I: Kind.F, Kind.W: Kind.I}
    for cell, action in _cells(order):
        if action.kind in first_needs:
            needed = action._replace(kind=first_needs[action.kind])
            if cells[needed] > cell:
                why = f"{action} stands before {needed} (position {cells[needed][1]})"
                raise _broken(order, 4, why, cell)


def _check_accumulation(order: Order) -> None:
    latest: dict[int, Action] = {}
    for cell, action in _cells(order):
        if action.kind in (Kind.B, Kind.W):
            before = latest.get(action.stage)
            if before is not None and before.microbatch > action.microbatch:
                why = f"{action} stands after {before}: weight gradients add up in microbatch order"
                raise _broken(order, 5, why, cell)
            latest[action.stage] = action


def _check_no_cycle(order: Order, cells: dict[Action, Cell], num_stages: int) -> None:
    position = [0] * len(order)
    ended: set[Action] = set()
    for rank, action in in_dependency_order(order, num_stages):
        position[rank] += 1
        ended.add(result_name(action))
    stuck = [rank for rank, actions in enumerate(order) if position[rank] < len(actions)]
    if not stuck:
        return
    # Every stuck rank waits for an action that stands later on a stuck rank. So walking from any
    # of them along "waits for" must meet a rank for the second time; from there on it is the cycle.
    walk: dict[int, str] = {}
    rank = stuck[0]
    while rank not in walk:
        action = order[rank][position[rank]]
        missing = next(need for need in dependencies(action, num_stages) if need not in ended)
        if missing not in cells:  # named as an I, done by a B
            missing = missing._replace(kind=Kind.B)
        holder, place = cells[missing]
        walk[rank] = (
            f"rank {rank} at {action} waits for {missing}, on rank {holder} at position {place}"
        )
        rank = holder
    cycle = list(walk)[list(walk).index(rank) :]
    why = "the ranks wait for each other: " + "; ".join(walk[rank] for rank in cycle)
    raise _broken(order, 6, why, *((rank, position[rank]) for rank in cycle))


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
    lines = []
    for rank in ranks:
        shown = [
            f"[{action}]" if (rank, start + offset) in cells else f" {action} "
            for offset, action in enumerate(order[rank][start:stop])
        ]
        before = "... " if start > 0 else ""
        after = " ..." if stop < len(order[rank]) else ""
        lines.append(f"  rank {rank:<3} {before}{' '.join(shown)}{after}".rstrip())
    if len(ranks) < len(order):
        lines.append(f"  ({len(order) - len(ranks)} of {len(order)} ranks not shown)")
    return "\n".join(lines)
