"""The text form of an action parses back to itself, and refuses everything else by name."""

import pytest

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Kind, order_text, parse_order


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("stage", [0, 7, 10, 123])
@pytest.mark.parametrize("microbatch", [0, 9, 10, 4096])
def test_text_form_parses_back(stage: int, kind: Kind, microbatch: int) -> None:
    action = Action(stage, kind, microbatch)
    assert str(action) == f"{stage}{kind.value}{microbatch}"
    assert Action.parse(str(action)) == action
    assert isinstance(Action.parse(str(action)).kind, Kind)


def test_the_examples_of_the_documents() -> None:
    assert str(Action(2, Kind.B, 1)) == "2B1"
    assert Action.parse("0F3") == Action(0, Kind.F, 3)
    assert Action.parse("1I0").kind is Kind.I
    assert Action.parse("1W0").kind is Kind.W


@pytest.mark.parametrize(
    "text",
    ["", "F", "2B", "B1", "2b1", "2X1", "-1F0", "2B1 ", "02B1", "2B01", "2B1\n", "2B1F0", "٢B1"],
)
def test_anything_else_is_refused_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Action.parse(text)
    assert repr(text) in str(caught.value)
    assert "2B1" in str(caught.value)


def test_orders_are_read_and_written() -> None:
    rows = ["0F0 0F1 0B0 0B1", "1F0 1I0 1W0 1F1 1B1"]
    order = parse_order(rows)
    assert order[1][1] == Action(1, Kind.I, 0)
    assert order_text(order) == [row.split() for row in rows]
    with pytest.raises(ScheduleError, match="'1Q0'"):
        parse_order(["0F0", "1F0 1Q0"])
