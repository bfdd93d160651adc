"""Small orders, written by hand, with what the built-in schedules do not have (yet).

INTERLEAVED has stages 0 and 2 on rank 0, 1 and 3 on rank 1. SPLIT has every backward cut into I and
W. LOOP (the V shape) has stages 0 and 3 on rank 0, so that stages 1 and 2 are neighbours on rank 1,
and one backward is whole while the others are split.
"""

from barepp.program.actions import parse_order

INTERLEAVED = parse_order(
    [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]
)
SPLIT = parse_order(
    [
        "0F0 0F1 0I0 0W0 0I1 0W1",
        "1F0 1I0 1F1 1I1 1W0 1W1",
    ]
)
LOOP = parse_order(
    [
        "0F0 3F0 3I0 3W0 0F1 3F1 3B1 0B0 0I1 0W1",
        "1F0 2F0 2B0 1I0 1W0 1F1 2F1 2I1 1I1 2W1 1W1",
    ]
)
BY_HAND = {"interleaved": (INTERLEAVED, 4), "split": (SPLIT, 2), "loop": (LOOP, 4)}
