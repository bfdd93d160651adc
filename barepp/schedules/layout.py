"""How many stages a schedule puts on each rank, checked in one sentence for all of them."""

from barepp.errors import ScheduleError


def require_one_stage_per_rank(name: str, num_stages: int, num_ranks: int) -> None:
    """Raise a ScheduleError unless every rank gets exactly one stage."""
    if num_ranks != num_stages:
        raise ScheduleError(
            f"{name} keeps exactly one stage on each rank: "
            f"{num_stages} stages need {num_stages} ranks, not {num_ranks}"
        )


def require_two_stages_per_rank(name: str, num_stages: int, num_ranks: int) -> None:
    """Raise a ScheduleError unless every rank gets exactly two stages."""
    if num_stages % 2:
        raise ScheduleError(
            f"{name} keeps exactly two stages on each rank: "
            f"the number of stages is even, not {num_stages}"
        )
    if num_stages != 2 * num_ranks:
        raise ScheduleError(
            f"{name} keeps exactly two stages on each rank: "
            f"{num_stages} stages need {num_stages // 2} ranks, not {num_ranks}"
        )


def require_equal_share(name: str, num_stages: int, num_ranks: int) -> int:
    """Return how many stages each rank gets; raise a ScheduleError unless all get as many."""
    if num_stages % num_ranks:
        raise ScheduleError(
            f"{name} keeps as many stages on each rank as on the others: "
            f"the number of stages is a multiple of {num_ranks} ranks, not {num_stages}"
        )
    return num_stages // num_ranks
