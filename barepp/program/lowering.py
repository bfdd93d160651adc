"""Turns an order into a program: each action with the rank it receives from and sends to.

Why a tag on every message? A rank may receive from one peer for several stages, microbatches and
directions, and the two sides need not work in the same order. A receive therefore names
(source, tag) and takes the message with that name, whenever it arrives.

Why is the number of the optimizer step not in the tag? Messages of one source and one tag arrive in
the order in which they were sent. Every step sends each tag exactly once and receives it exactly
once, so the n-th receive of a tag gets the message of the n-th step.
"""

from typing import NamedTuple

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Order
from barepp.program.dependencies import dependencies, result_name


class Step(NamedTuple):
    """An action and its two messages; None where nothing crosses between ranks.

    Stages 0 and 1 on ranks 0 and 1:      0F0  receive_from=None  send_to=1     (an activation)
                                          1F0  receive_from=0     send_to=None
                                          1B0  receive_from=None  send_to=0     (a gradient)
                                          0B0  receive_from=1     send_to=None
    Neighbouring stages on one rank hand the tensor over in memory: None on both sides.
    """

    action: Action
    receive_from: int | None
    send_to: int | None


Program = list[list[Step]]  # program[rank], first to last

_STAGE_BITS = 20
_MICROBATCH_BITS = 40
_STAGE_LIMIT = 1 << _STAGE_BITS
_MICROBATCH_LIMIT = 1 << _MICROBATCH_BITS
MAX_TAG = (1 << (_MICROBATCH_BITS + _STAGE_BITS + 1)) - 1


def placement(order: Order) -> dict[int, int]:
    """Return which rank holds each stage that appears in `order`."""
    return {action.stage: rank for rank, actions in enumerate(order) for action in actions}


def lower(order: Order, num_stages: int) -> Program:
    """Return, for each rank, its actions with their messages; `order` must be valid."""
    holder = placement(order)
    receive_from: dict[Action, int] = {}
    send_to: dict[Action, int] = {}
    # A message is an arrow of the dependency graph whose two ends live on different ranks. Each
    # action has at most one such arrow in and one out, since only neighbouring stages are joined.
    for rank, actions in enumerate(order):
        for action in actions:
            for need in dependencies(action, num_stages):
                source = holder[need.stage]
                if source != rank:
                    receive_from[action] = source
                    send_to[need] = rank
    return [
        [Step(action, receive_from.get(action), send_to.get(result_name(action))) for action in row]
        for row in order
    ]


def activation_tag(stage: int, microbatch: int) -> int:
    """Return the tag of the activation that `stage` (the receiver) takes for `microbatch`."""
    return _tag(stage, microbatch, 0)


def gradient_tag(stage: int, microbatch: int) -> int:
    """Return the tag of the gradient that `stage` (the receiver) takes for `microbatch`."""
    return _tag(stage, microbatch, 1)


def _tag(stage: int, microbatch: int, direction: int) -> int:
    # | microbatch: 40 bits | receiving stage: 20 bits | 0 activation, 1 gradient |  <= MAX_TAG
    if not (0 <= stage < _STAGE_LIMIT and 0 <= microbatch < _MICROBATCH_LIMIT):
        raise ScheduleError(
            f"no tag for stage {stage}, microbatch {microbatch}: a tag has room for stages below "
            f"2**{_STAGE_BITS} and microbatches below 2**{_MICROBATCH_BITS}"
        )
    return microbatch << (_STAGE_BITS + 1) | stage << 1 | direction
