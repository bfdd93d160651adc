"""What a rank does at one moment, and its text form: "2B1" is stage 2, B, microbatch 1.

rank 0    0F0  0F1  0B0  0B1      an order: a list of actions a rank, first to last
rank 1    1F0  1B0  1F1  1B1      (two stages, two microbatches, the schedule 1F1B)
"""

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from barepp.errors import ScheduleError


class Kind(str, Enum):
    """The four kinds of computation; I and W together do what one B does.

    Why split a backward at all? The stage before waits only for the input gradient (I). Only the
    optimizer needs the weight gradient (W), so W can run later and fill a bubble
    (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", arXiv 2401.10241 §2; their B is our I).
    """

    F = "F"  # forward
    B = "B"  # full backward: input gradient and weight gradient
    I = "I"  # noqa: E741  input gradient only
    W = "W"  # weight gradient only


class Action(NamedTuple):
    """One computation: this kind, of this stage, for this microbatch."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read the text form back: `Action.parse(str(action)) == action`."""
        match = _TEXT_FORM.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"{text!r} is not an action: write stage, kind (F, B, I, W), microbatch, as in 2B1"
            )
        stage, kind, microbatch = match.groups()
        return cls(int(stage), Kind(kind), int(microbatch))


# No sign and no leading zeros, so that one action has one text.
_TEXT_FORM = re.compile(r"(0|[1-9][0-9]*)([FBIW])(0|[1-9][0-9]*)")

# order[rank] lists what that rank does, first to last. It says nothing about time: a rank starts
# an action when its own previous one has ended and what the action needs has arrived.
Order = Sequence[Sequence[Action]]


def parse_order(rows: Iterable[str]) -> list[list[Action]]:
    """Read an order written by hand, a text per rank: `parse_order(["0F0 0B0", "1F0 1B0"])`."""
    return [[Action.parse(word) for word in row.split()] for row in rows]


def order_text(order: Order) -> list[list[str]]:
    """Return the order with each action in its text form, as `--json` prints it."""
    return [[str(action) for action in actions] for actions in order]
