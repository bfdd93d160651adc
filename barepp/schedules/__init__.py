"""The schedules by name: `make_schedule` makes, validates and returns one.

A schedule is a pure function (num_stages, num_microbatches, num_ranks) -> each rank's list, in a
file of its own. To add one, write that file and add its line to `_SCHEDULES`; it is then validated,
drawn, simulated and executed like the others.

In reading order:

    naive.py             one microbatch at a time
    gpipe.py             all forwards, then all backwards
    one_f_one_b.py       a backward as soon as there is one
    layout.py            which rank holds which stage, with several stages a rank
    interleaved_1f1b.py  1F1B with several stages a rank
    zb_h1.py             backwards in two parts: the input's gradient first
    zb_v.py              the same with two stages a rank, placed in a V
    user_schedule.py     a schedule from a file of yours
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Order
from barepp.program.validation import check_sizes, validate
from barepp.schedules.gpipe import gpipe_order
from barepp.schedules.interleaved_1f1b import interleaved_1f1b_order
from barepp.schedules.naive import naive_order
from barepp.schedules.one_f_one_b import one_f_one_b_order
from barepp.schedules.zb_h1 import zb_h1_order
from barepp.schedules.zb_v import zb_v_order

ScheduleFunction = Callable[[int, int, int], Iterable[list[Action]]]

_SCHEDULES: dict[str, ScheduleFunction] = {
    "naive": naive_order,
    "gpipe": gpipe_order,
    "1f1b": one_f_one_b_order,
    "interleaved_1f1b": interleaved_1f1b_order,
    "zb_h1": zb_h1_order,
    "zb_v": zb_v_order,
}

# How many stages a rank holds when nobody says how many ranks there are; 1 if not named here.
_USUAL_STAGES_PER_RANK = {"zb_v": 2}
# The same when nobody says how many stages there are.
_USUAL_STAGES_FOR_RANKS = {"interleaved_1f1b": 2, "zb_v": 2}


@dataclass(frozen=True)
class Schedule:
    """An order and what it is for; one that exists is valid, also when it is written by hand."""

    name: str
    num_stages: int
    num_ranks: int
    num_microbatches: int
    order: Order

    def __post_init__(self) -> None:
        if len(self.order) != self.num_ranks:
            raise ScheduleError(
                f"{self.name} is for {self.num_ranks} ranks, but its order lists {len(self.order)}"
            )
        validate(self.order, self.num_stages, self.num_microbatches)


def schedule_names() -> list[str]:
    """Return the names that `make_schedule` knows."""
    return list(_SCHEDULES)


def usual_stages(name: str, num_ranks: int) -> int:
    """Return into how many stages a model is cut for so many ranks when nobody says."""
    return num_ranks * _USUAL_STAGES_FOR_RANKS.get(name, 1)


def make_schedule(
    name: str, num_stages: int, num_microbatches: int, num_ranks: int | None = None
) -> Schedule:
    """Return the schedule `name`, validated; a name may be path/to/file.py:function.

    num_ranks defaults to one rank for each stage, in zb_v for every two.
    """
    function = _function(name)
    check_sizes(num_stages, num_microbatches)
    if num_ranks is None:
        ranks = -(-num_stages // _USUAL_STAGES_PER_RANK.get(name, 1))  # division, rounded up
    else:
        ranks = num_ranks
    if ranks < 1:
        raise ScheduleError(f"a pipeline needs at least 1 rank, not {ranks}")
    order = [list(row) for row in function(num_stages, num_microbatches, ranks)]
    return Schedule(name, num_stages, ranks, num_microbatches, order)


def _function(name: str) -> ScheduleFunction:
    if name in _SCHEDULES:
        return _SCHEDULES[name]
    from barepp.schedules.user_schedule import is_own, own_order

    if is_own(name):
        return partial(own_order, name)
    raise ScheduleError(
        f"no schedule is called {name!r}; there are {', '.join(_SCHEDULES)}, "
        "and your own: path/to/file.py:function"
    )
