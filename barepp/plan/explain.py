"""What one rank does, line by line: receives, computes, sends; from the program that it executes.

1F0   receive activation 0 from rank 0   forward of stage 1    send activation 0 to rank 2
1B0   receive gradient 0 from rank 2     backward of stage 1   send gradient 0 to rank 0
"""

from __future__ import annotations

from typing import Final

from barepp.errors import UsageError
from barepp.program.actions import Kind
from barepp.program.lowering import Step, lower
from barepp.schedules import Schedule

_COMPUTES: Final = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
}


def explain(schedule: Schedule, rank: int) -> str:
    """Return a line for each action of a rank.

    Raises:
        UsageError: there is no such rank.
    """
    if not 0 <= rank < schedule.num_ranks:
        raise UsageError(f"there is no rank {rank}: the ranks are 0 to {schedule.num_ranks - 1}")
    last = schedule.num_stages - 1
    program = lower(schedule.order, schedule.num_stages)[rank]
    rows = [(str(step.action), *_parts(step, last)) for step in program]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    head = (
        f"rank {rank} of {schedule.num_ranks} in {schedule.name}: what it does in a step "
        "(receives are posted before it, sends are waited for after it)"
    )
    return "\n".join([head, "", *lines])


def _parts(step: Step, last: int) -> tuple[str, str, str]:
    """Return what an action receives, computes and sends, in words."""
    (stage, kind, microbatch), source, target = step
    what = "activation" if kind is Kind.F else "gradient"
    # Where nothing is received or sent, a stage of this rank gives or takes it, or the batch does.
    takes = f"take {what} {microbatch} from my own stage"
    gives = f"hand {what} {microbatch} to my own stage"
    if kind is Kind.W:
        takes, gives = f"use what {stage}I{microbatch} has kept", ""
    elif stage == (0 if kind is Kind.F else last):
        takes = f"take microbatch {microbatch}" if kind is Kind.F else "start from the loss"
    if stage == (last if kind is Kind.F else 0):
        gives = "keep the loss" if kind is Kind.F else ""
    return (
        takes if source is None else f"receive {what} {microbatch} from rank {source}",
        f"{_COMPUTES[kind]} of stage {stage}",
        gives if target is None else f"send {what} {microbatch} to rank {target}",
    )
