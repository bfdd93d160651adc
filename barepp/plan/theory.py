"""What the papers say about a schedule's bubble, where their formula holds: to compare with."""

from typing import NamedTuple

from barepp.plan.simulate import Costs
from barepp.program.dry_run import Number
from barepp.schedules import Schedule


class Theory(NamedTuple):
    """A bubble as a formula and as the fraction that it comes to."""

    formula: str
    idle: int
    whole: int


def bubble_in_theory(schedule: Schedule, costs: Costs) -> Theory | None:
    """Return the bubble by formula, for stages of equal costs; None where there is none."""
    p, m, v = schedule.num_ranks, schedule.num_microbatches, schedule.num_stages
    v //= p
    each = costs.forward, costs.backward_input, costs.backward_weight
    if not all(isinstance(cost, Number) for cost in each) or not any(each):
        return None
    thirds = each[0] == each[1] == each[2]
    formulas = {
        "naive": (True, "(p - 1) / p", p),
        "gpipe": (True, "(p - 1) / (m + p - 1)", m + p - 1),
        "1f1b": (True, "(p - 1) / (m + p - 1)", m + p - 1),
        "interleaved_1f1b": (m % p == 0, "(p - 1) / (v * m + p - 1)", v * m + p - 1),
        "zb_h1": (thirds and m >= p, "(p - 1) / (3 * m + p - 1)", 3 * m + p - 1),
        "zb_v": (thirds and 2 * m >= 3 * p - 1, "(p - 1) / (6 * m + p - 1)", 6 * m + p - 1),
    }
    holds, formula, whole = formulas.get(schedule.name, (False, "", 1))
    return Theory(formula, p - 1, whole) if holds else None
