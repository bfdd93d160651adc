"""Every way to break an order is refused, with the rule, the cell and the marked lists."""

import random
import time

import pytest
from orders import BY_HAND

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Kind, Order, order_text, parse_order
from barepp.program.dependencies import dependencies
from barepp.program.validation import validate
from barepp.schedules import make_schedule

VALID: dict[str, tuple[Order, int]] = {
    **BY_HAND,
    "naive": (make_schedule("naive", 3, 2).order, 3),
    "gpipe": (make_schedule("gpipe", 3, 2).order, 3),
    "1f1b": (make_schedule("1f1b", 3, 2).order, 3),
    "interleaved_1f1b": (make_schedule("interleaved_1f1b", 4, 2, 2).order, 4),
    "zb_h1": (make_schedule("zb_h1", 3, 2).order, 3),
    "zb_v": (make_schedule("zb_v", 4, 2).order, 4),
}
everywhere = pytest.mark.parametrize("name", list(VALID))


def copy_of(order: Order) -> list[list[Action]]:
    return [list(actions) for actions in order]


def refusal(order: Order, stages: int = 2, microbatches: int = 2) -> str:
    with pytest.raises(ScheduleError) as caught:
        validate(order, stages, microbatches)
    return str(caught.value)


@everywhere
def test_the_orders_to_be_broken_are_valid(name: str) -> None:
    order, stages = VALID[name]
    before = copy_of(order)
    validate(order, stages, 2)
    assert order == before


@pytest.mark.parametrize(
    ("rows", "rule", "where", "why"),
    [
        # Rule 1: unknown stage, unknown microbatch.
        (["0F0 2F0 0B0", "1F0 1B0"], 1, "rank 0, position 1 (2F0)", "stage 2 does not"),
        (["0F0 0B0", "1F0 1B0 1F2"], 1, "rank 1, position 2 (1F2)", "microbatch 2 does"),
        # Rule 2: a stage on two ranks, a stage on none.
        (["0F0 0B0", "1F0 1B0 0F1"], 2, "rank 1, position 2 (0F1)", "stage 0 is already"),
        (["0F0 0B0 0F1 0B1"], 2, None, "no rank holds stage 1 of 2"),
        ([], 2, None, "no rank holds stage 0 of 2"),
        # Rule 3: twice, whole and split, missing.
        (["0F0 0F0 0B0", "1F0 1B0"], 3, "rank 0, position 1 (0F0)", "0F0 stands twice"),
        (["0F0 0B0 0B0", "1F0 1B0"], 3, "rank 0, position 2 (0B0)", "0B0 stands twice"),
        (["0F0 0B0 0W0", "1F0 1B0"], 3, "rank 0, position 2 (0W0)", "0B0 at position 1"),
        (["0F0 0I0 0B0", "1F0 1B0"], 3, "rank 0, position 2 (0B0)", "0I0 at position 1"),
        (["0F0 0B0", "1F0 1B0"], 3, None, "0F1 is missing, and so is all of microbatch 1"),
        (["0F0 0B0 0F1", "1F0 1B0"], 3, "rank 0, position 2 (0F1)", "0B1 (or 0I1 and 0W1)"),
        (["0F0 0B0 0F1 0I1", "1F0 1B0"], 3, "rank 0, position 3 (0I1)", "0W1 is missing"),
        (["0F0 0B0 0F1 0W1", "1F0 1B0"], 3, "rank 0, position 3 (0W1)", "0I1 is missing"),
        (["0F0 0B0 0B1", "1F0 1B0"], 3, "rank 0, position 2 (0B1)", "0F1 is missing"),
        # Rule 4: backward before forward, W before I.
        (
            ["0F0 0B0 0F1 0B1", "1B0 1F0 1F1 1B1"],
            4,
            "rank 1, position 0 (1B0)",
            "1B0 stands before 1F0 (position 1)",
        ),
        (
            ["0F0 0B0 0F1 0B1", "1F0 1W0 1I0 1F1 1B1"],
            4,
            "rank 1, position 1 (1W0)",
            "1W0 stands before 1I0 (position 2)",
        ),
        # Rule 5: gradients added in another order; I alone may come in any.
        (
            ["0F0 0F1 0B1 0B0", "1F0 1F1 1B1 1B0"],
            5,
            "rank 0, position 3 (0B0)",
            "0B0 stands after 0B1",
        ),
        (
            ["0F0 0F1 0I0 0I1 0W1 0W0", "1F0 1F1 1B0 1B1"],
            5,
            "rank 0, position 5 (0W0)",
            "0W0 stands after 0W1",
        ),
    ],
)
def test_each_rule_names_the_cell(rows: list[str], rule: int, where: str | None, why: str) -> None:
    message = refusal(parse_order(rows))
    if where is None:
        assert f"rule {rule} broken: {why}" in message
    else:
        assert f"rule {rule} broken at {where}: {why}" in message
        cell = where[where.index("(") + 1 : -1]
        assert message.count(f"[{cell}]") == 1  # it is marked in the lists


@pytest.mark.parametrize(
    ("action", "needs"),
    [
        ("0F5", ""),
        ("1F5", "0F5"),
        ("2F5", "1F5"),
        ("2B5", "2F5"),
        ("1B5", "1F5 2I5"),  # 2I5 stands for 2I5 or 2B5, whichever makes that gradient
        ("0I5", "0F5 1I5"),
        ("2I5", "2F5"),
        ("0W5", "0I5"),
    ],
)
def test_what_each_action_of_three_stages_waits_for(action: str, needs: str) -> None:
    found = dependencies(Action.parse(action), 3)
    assert [str(need) for need in found] == needs.split()


def test_input_gradients_and_forwards_may_come_in_any_order() -> None:
    rows = ["0F1 0F0 0I1 0I0 0W0 0W1", "1F1 1F0 1I1 1I0 1W0 1W1"]
    validate(parse_order(rows), 2, 2)


def test_a_cycle_across_ranks_names_who_waits_for_whom() -> None:
    """Each list is fine by itself; together nobody can go on.

    rank 0   0F0  0B0 .....waits for 1B0...     0F1  0B1
    rank 1   1F0  1F1 .....waits for 0F1...     1B0  1B1
    """
    message = refusal(parse_order(["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"]))
    assert "rule 6 broken at rank 0, position 1 (0B0)" in message
    assert "rank 0 at 0B0 waits for 1B0, on rank 1 at position 2" in message
    assert "rank 1 at 1F1 waits for 0F1, on rank 0 at position 2" in message
    assert "[0B0]" in message
    assert "[1F1]" in message


def test_a_cycle_is_told_without_those_who_only_wait_for_it() -> None:
    """Rank 0 is stuck because ranks 1 and 2 are; the cycle is theirs."""
    rows = ["0F0 0B0 0F1 0B1", "1F0 1B0 1F1 1B1", "2F0 2F1 2B0 2B1"]
    message = refusal(parse_order(rows), stages=3)
    assert "rank 1 at 1B0 waits for 2B0" in message
    assert "rank 2 at 2F1 waits for 1F1" in message
    assert "rank 0 at" not in message


def test_a_rank_can_wait_for_itself() -> None:
    message = refusal(parse_order(["1F0 0F0 1B0 0B0"]), stages=2, microbatches=1)
    assert "rank 0 at 1F0 waits for 0F0, on rank 0 at position 1" in message


def test_a_split_backward_in_a_cycle_is_named_as_it_stands() -> None:
    rows = ["0F0 0I0 0F1 0I1 0W0 0W1", "1F0 1F1 1I0 1W0 1I1 1W1"]
    assert "rank 0 at 0I0 waits for 1I0" in refusal(parse_order(rows))


@everywhere
def test_every_dropped_action_is_missed(name: str) -> None:
    order, stages = VALID[name]
    for rank, actions in enumerate(order):
        for position, action in enumerate(actions):
            broken = copy_of(order)
            del broken[rank][position]
            message = refusal(broken, stages)
            assert "rule 3 broken at rank" in message
            assert f"{action} " in message
            assert "missing" in message


@everywhere
def test_every_doubled_action_is_found_where_it_stands(name: str) -> None:
    order, stages = VALID[name]
    for rank, actions in enumerate(order):
        for position, action in enumerate(actions):
            broken = copy_of(order)
            broken[rank].append(action)
            where = f"rule 3 broken at rank {rank}, position {len(actions)} ({action})"
            message = refusal(broken, stages)
            assert f"{where}: {action} stands twice, first at position {position}" in message


@everywhere
def test_every_action_moved_to_another_rank_is_found(name: str) -> None:
    order, stages = VALID[name]
    for rank, actions in enumerate(order):
        for position, action in enumerate(actions):
            for other in set(range(len(order))) - {rank}:
                broken = copy_of(order)
                broken[other].append(broken[rank].pop(position))
                message = refusal(broken, stages)
                assert "rule 2 broken at rank" in message
                assert f"stage {action.stage} is already on rank {min(rank, other)}" in message


@everywhere
def test_every_swap_is_refused_or_still_runs(name: str) -> None:
    """A swap on one rank keeps rules 1 to 3. The oracle for the rest: try to run it, slowly."""
    order, stages = VALID[name]
    for rank, actions in enumerate(order):
        for one in range(len(actions)):
            for two in range(one + 1, len(actions)):
                swapped = copy_of(order)
                row = swapped[rank]
                row[one], row[two] = row[two], row[one]
                if runs(swapped, stages) and adds_in_order(swapped):
                    validate(swapped, stages, 2)
                else:
                    message = refusal(swapped, stages)
                    assert any(f"rule {rule} broken at rank" in message for rule in (4, 5, 6))


@pytest.mark.parametrize("seed", range(200))
def test_shuffled_orders_are_judged_as_by_trying(seed: int) -> None:
    """Random lists over 3 ranks: validate accepts exactly those that the slow oracle can run."""
    rng = random.Random(seed)
    order: list[list[Action]] = []
    for stage in range(3):
        row = list(make_schedule("gpipe", 3, 3).order[stage])
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(row) - 1)
            row[at], row[at + 1] = row[at + 1], row[at]
        order.append(row)
    if runs(order, 3) and adds_in_order(order):
        validate(order, 3, 3)
    else:
        refusal(order, 3, 3)


def runs(order: Order, stages: int) -> bool:
    """Try every rank again and again until nothing moves; written apart from barepp's own graph."""
    done: set[str] = set()
    rows = [list(actions) for actions in order]
    moved = True
    while moved:
        moved = False
        for row in rows:
            while row and ready(row[0], done, stages):
                done.add(str(row.pop(0)))
                moved = True
    return not any(rows)


def ready(action: Action, done: set[str], stages: int) -> bool:
    s, b = action.stage, action.microbatch
    if action.kind is Kind.F:
        return s == 0 or f"{s - 1}F{b}" in done
    if action.kind is Kind.W:
        return f"{s}I{b}" in done
    gradient = s == stages - 1 or f"{s + 1}B{b}" in done or f"{s + 1}I{b}" in done
    return f"{s}F{b}" in done and gradient


def adds_in_order(order: Order) -> bool:
    adding = [a for row in order for a in row if a.kind in (Kind.B, Kind.W)]
    by_stage = [[a.microbatch for a in adding if a.stage == s] for s in {a.stage for a in adding}]
    return all(numbers == sorted(numbers) for numbers in by_stage)


def test_the_lists_are_shown_with_the_wrong_cell_marked() -> None:
    message = refusal(parse_order(["0F0 0B0", "1B0 1F0"]), microbatches=1)
    assert message.splitlines()[1:] == [
        "  rank 0    0F0   0B0",
        "  rank 1   [1B0]  1F0",
    ]


def test_the_columns_of_the_lists_stand_below_each_other() -> None:
    order = copy_of(make_schedule("gpipe", 2, 12).order)
    order[1][10], order[1][22] = order[1][22], order[1][10]
    _, one, other = refusal(order, 2, 12).splitlines()
    assert "[1B10]" in other
    for action in ("F6", "F9", "F11", "B0", "B3"):
        assert one.index(f"0{action} ") == other.index(f"1{action} ")


def test_of_a_long_order_only_the_surroundings_are_shown() -> None:
    order = copy_of(make_schedule("1f1b", 40, 300).order)
    row = order[20]
    at = row.index(Action.parse("20B150"))
    row[at], row[at + 2] = row[at + 2], row[at]
    message = refusal(order, 40, 300)
    assert f"rule 5 broken at rank 20, position {at + 2} (20B150)" in message
    assert "[20B150]" in message
    assert "(23 of 40 ranks not shown)" in message
    assert max(len(line) for line in message.splitlines()) < 140


@pytest.mark.parametrize(("stages", "microbatches"), [(0, 1), (1, 0), (-1, 1), (1, -1)])
def test_no_stage_or_no_microbatch_is_a_sentence(stages: int, microbatches: int) -> None:
    assert "at least 1" in refusal(parse_order(["0F0 0B0"]), stages, microbatches)


def test_four_times_the_actions_take_four_times_as_long_not_sixteen() -> None:
    def seconds(microbatches: int) -> float:
        order = make_schedule("gpipe", 8, microbatches).order
        begin = time.process_time()
        validate(order, 8, microbatches)
        return time.process_time() - begin

    short = min(seconds(250) for _ in range(3))
    assert min(seconds(1000) for _ in range(3)) < 9 * short


def test_the_rules_at_the_head_of_the_file_are_those_that_are_tested() -> None:
    import barepp.program.validation

    text = barepp.program.validation.__doc__ or ""
    assert [rule for rule in range(1, 10) if f"\n{rule}. " in text] == [1, 2, 3, 4, 5, 6]
    assert order_text(VALID["split"][0])[1][1] == "1I0"
