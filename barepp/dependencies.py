"""What each action must wait for: the one graph that is validated, lowered and simulated.

The graph of two stages and one microbatch; an arrow reads "must end before". Arrows between
stages become messages when the stages live on different ranks.

    0F0 ---activation--> 1F0
     |                    |
     v                    v
    0B0 <---gradient---- 1B0        where a backward is split, I takes the place of B and
                                    its W follows:   0I0 --> 0W0
"""

from collections import deque
from collections.abc import Iterator

from barepp.actions import Action, Kind, Order


def dependencies(action: Action, num_stages: int) -> tuple[Action, ...]:
    """Return what must have ended before `action` may start, each under its `result_name`."""
    stage, kind, microbatch = action
    if kind is Kind.F:
        return (Action(stage - 1, Kind.F, microbatch),) if stage > 0 else ()
    if kind is Kind.W:
        return (Action(stage, Kind.I, microbatch),)
    own_forward = Action(stage, Kind.F, microbatch)
    if stage == num_stages - 1:  # the loss is computed here: no gradient comes from elsewhere
        return (own_forward,)
    return (own_forward, Action(stage + 1, Kind.I, microbatch))


def result_name(action: Action) -> Action:
    """Return the name under which others wait for `action`: a B is known by the I it contains.

    Who needs an input gradient does not care whether an I or a B made it, so there is one name for
    both, and an order may split some backwards and leave others whole.
    """
    return action._replace(kind=Kind.I) if action.kind is Kind.B else action


def in_dependency_order(order: Order, num_stages: int) -> Iterator[tuple[int, Action]]:
    """Yield (rank, action): each rank's list in its order, every action after what it needs.

    It ends early, with actions left over, where ranks wait for each other for ever. Linear: a rank
    that cannot go on sleeps under the name of what it misses and is woken by it, once.
    """
    ended: set[Action] = set()
    asleep: dict[Action, list[int]] = {}
    position = [0] * len(order)
    awake = deque(range(len(order)))
    while awake:
        rank = awake.popleft()
        while position[rank] < len(order[rank]):
            action = order[rank][position[rank]]
            needs = dependencies(action, num_stages)
            missing = next((need for need in needs if need not in ended), None)
            if missing is not None:
                asleep.setdefault(missing, []).append(rank)
                break
            position[rank] += 1
            ended.add(result_name(action))
            awake.extend(asleep.pop(result_name(action), ()))
            yield rank, action
