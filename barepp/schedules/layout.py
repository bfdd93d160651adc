"""How many stages a schedule puts on each rank, checked in one sentence for all of them."""

from barepp.errors import ScheduleError


def require_one_stage_per_rank(name: str, num_stages: int, num_ranks: int) -> None:
    """Raise a ScheduleError unless every rank gets exactly one stage."""
    if num_ranks != num_stages:
        raise ScheduleError(
            f"{name} keeps exactly one stage on each rank: "
            f"{num_stages} stages need {num_stages} ranks, not {num_ranks}"
        )
