"""Every arrow of the graph that crosses ranks becomes one send and one receive of the same tag."""

import random
from collections import Counter

import pytest
from orders import BY_HAND, INTERLEAVED, LOOP, SPLIT

from barepp.errors import ScheduleError
from barepp.program.actions import Kind, Order
from barepp.program.lowering import MAX_TAG, Program, activation_tag, gradient_tag, lower, placement
from barepp.schedules import make_schedule

ORDERS: dict[str, tuple[Order, int]] = {
    **BY_HAND,
    **{
        f"{name} {p} {m}": (make_schedule(name, 2 * p, m).order, 2 * p)
        for name in ("naive", "gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v")
        for p in (1, 2, 4)
        for m in (1, 3, 6)
    },
}
everywhere = pytest.mark.parametrize("name", list(ORDERS))


def show(program: Program) -> list[str]:
    """Write "<0 1F0 >2": receive from rank 0, do 1F0, send to rank 2."""
    texts = []
    for row in program:
        words = []
        for action, source, to in row:
            words.append("" if source is None else f"<{source} ")
            words[-1] += str(action) + ("" if to is None else f" >{to}")
        texts.append(" | ".join(words))
    return texts


def test_two_ranks_by_hand() -> None:
    assert show(lower(make_schedule("gpipe", 2, 2).order, 2)) == [
        "0F0 >1 | 0F1 >1 | <1 0B0 | <1 0B1",
        "<0 1F0 | <0 1F1 | 1B0 >0 | 1B1 >0",
    ]


def test_one_rank_sends_nothing() -> None:
    assert show(lower(make_schedule("1f1b", 1, 2).order, 1)) == ["0F0 | 0B0 | 0F1 | 0B1"]


def test_interleaved_goes_round_the_ranks() -> None:
    assert show(lower(INTERLEAVED, 4)) == [
        "0F0 >1 | 0F1 >1 | <1 2F0 >1 | <1 2F1 >1 | <1 2B0 >1 | <1 2B1 >1 | <1 0B0 | <1 0B1",
        "<0 1F0 >0 | <0 1F1 >0 | <0 3F0 | 3B0 >0 | <0 3F1 | 3B1 >0 | <0 1B0 >0 | <0 1B1 >0",
    ]


def test_of_a_split_backward_the_input_part_sends_and_receives() -> None:
    assert show(lower(SPLIT, 2)) == [
        "0F0 >1 | 0F1 >1 | <1 0I0 | 0W0 | <1 0I1 | 0W1",
        "<0 1F0 | 1I0 >0 | <0 1F1 | 1I1 >0 | 1W0 | 1W1",
    ]


def test_neighbours_on_one_rank_send_nothing_between_them() -> None:
    assert show(lower(LOOP, 4)) == [
        "0F0 >1 | <1 3F0 | 3I0 >1 | 3W0 | 0F1 >1 | <1 3F1 | 3B1 >1 | <1 0B0 | <1 0I1 | 0W1",
        "<0 1F0 | 2F0 >0 | <0 2B0 | 1I0 >0 | 1W0 | <0 1F1 | 2F1 >0 | <0 2I1 | 1I1 >0 | 2W1 | 1W1",
    ]


def test_placement() -> None:
    assert placement(LOOP) == {0: 0, 3: 0, 1: 1, 2: 1}
    assert placement(make_schedule("naive", 3, 1).order) == {0: 0, 1: 1, 2: 2}


@everywhere
def test_the_program_is_the_order(name: str) -> None:
    order, stages = ORDERS[name]
    assert [[step.action for step in row] for row in lower(order, stages)] == order


@everywhere
def test_every_send_meets_one_receive(name: str) -> None:
    """(from, to, tag) of all sends equal those of all receives, each once."""
    order, stages = ORDERS[name]
    sent: Counter[tuple[int, int, int]] = Counter()
    received: Counter[tuple[int, int, int]] = Counter()
    for rank, row in enumerate(lower(order, stages)):
        for (stage, kind, microbatch), source, to in row:
            forward = kind is Kind.F
            tag_of = activation_tag if forward else gradient_tag
            if to is not None:
                sent[rank, to, tag_of(stage + 1 if forward else stage - 1, microbatch)] += 1
            if source is not None:
                received[source, rank, tag_of(stage, microbatch)] += 1
            assert rank not in (source, to)
    assert sent == received
    assert set(sent.values()) <= {1}
    holder = placement(order)
    crossings = sum(holder[s] != holder[s + 1] for s in range(stages - 1))
    microbatches = len({action.microbatch for row in order for action in row})
    assert sum(sent.values()) == 2 * crossings * microbatches


def test_tags_are_unique_and_small_enough() -> None:
    rng = random.Random(1)
    edges = [0, 1, 2, 3, 255, 256, 2**20 - 1]
    names = {(s, b) for s in edges for b in [*edges, 2**32, 2**40 - 1]}
    names |= {(rng.randrange(2**20), rng.randrange(2**40)) for _ in range(2000)}
    tags = [tag_of(s, b) for s, b in names for tag_of in (activation_tag, gradient_tag)]
    assert len(set(tags)) == len(tags)
    assert min(tags) >= 0
    assert max(tags) == MAX_TAG < 2**62


@pytest.mark.parametrize(("stage", "microbatch"), [(-1, 0), (0, -1), (2**20, 0), (0, 2**40)])
def test_no_tag_outside_its_bits(stage: int, microbatch: int) -> None:
    with pytest.raises(ScheduleError, match=f"stage {stage}, microbatch {microbatch}"):
        activation_tag(stage, microbatch)
