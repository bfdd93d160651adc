"""What each action must wait for: the one graph that is validated, lowered and simulated.

The graph of two stages and one microbatch; an arrow reads "must end before". Arrows between
stages become messages when the stages live on different ranks.

    0F0 ---activation--> 1F0
     |                    |
     v                    v
    0B0 <---gradient---- 1B0        where a backward is split, I takes the place of B and
                                    its W follows:   0I0 --> 0W0
"""

from barepp.program.actions import Action, Kind

# What an action of this kind needs, of its own microbatch: a result, and of which stage, counted
# from its own. Where that stage would lie before the first or behind the last, nothing is needed:
# the first stage's input is the data, and the last one's gradient starts at the loss.
_NEEDS: dict[Kind, tuple[tuple[Kind, int], ...]] = {
    Kind.F: ((Kind.F, -1),),
    Kind.B: ((Kind.F, 0), (Kind.I, +1)),
    Kind.I: ((Kind.F, 0), (Kind.I, +1)),
    Kind.W: ((Kind.I, 0),),
}


def dependencies(action: Action, num_stages: int) -> tuple[Action, ...]:
    """Return what must have ended before `action` may start, each under its `result_name`."""
    stage, kind, microbatch = action
    return tuple(
        Action(stage + offset, result, microbatch)
        for result, offset in _NEEDS[kind]
        if 0 <= stage + offset < num_stages
    )


def result_name(action: Action) -> Action:
    """Return the name under which others wait for `action`: a B is known by the I it contains.

    Who needs an input gradient does not care whether an I or a B made it, so there is one name for
    both, and an order may split some backwards and leave others whole.
    """
    return action._replace(kind=Kind.I) if action.kind is Kind.B else action
