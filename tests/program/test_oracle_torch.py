"""A second opinion: torch's own checker, simulator and lowering agree with barepp's.

They are private there, so where a torch has renamed them these tests are skipped, saying so.
"""

from typing import Any

import pytest
from orders import BY_HAND

from barepp.errors import ScheduleError
from barepp.program.actions import Kind, Order, parse_order
from barepp.program.lowering import lower, placement
from barepp.program.validation import validate
from barepp.schedules import make_schedule

theirs: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
for _name in ("_Action", "_add_send_recv", "_simulate_comms_compute", "_validate_schedule"):
    if not hasattr(theirs, _name):
        pytest.skip(f"this torch has no pipelining.schedules.{_name}", allow_module_level=True)

ORDERS: dict[str, tuple[Order, int, int]] = {
    **{name: (order, stages, 2) for name, (order, stages) in BY_HAND.items()},
    **{
        f"{name} {p} {m}": (make_schedule(name, p, m).order, p, m)
        for name in ("naive", "gpipe", "1f1b", "zb_h1")
        for p in (1, 2, 3, 4, 8)
        for m in (1, 2, 3, 8)
    },
    **{
        f"{name} {v} x {p} {m}": (make_schedule(name, v * p, m, p).order, v * p, m)
        for name, shares in (("interleaved_1f1b", (2, 3)), ("zb_v", (2,)))
        for v in shares
        for p in (1, 2, 3, 4)
        for m in (1, 3, 4, 9)
    },
}
everywhere = pytest.mark.parametrize("name", list(ORDERS))


def translated(order: Order) -> dict[int, list[Any]]:
    return {
        rank: [theirs._Action.from_str(str(action)) for action in actions]
        for rank, actions in enumerate(order)
    }


@everywhere
def test_torch_finds_our_orders_valid(name: str) -> None:
    order, stages, microbatches = ORDERS[name]
    held = theirs._validate_schedule(translated(order), len(order), stages, microbatches)
    assert held == placement(order)


@everywhere
def test_torch_lowers_to_the_same_messages(name: str) -> None:
    """Its SEND_F, RECV_F, SEND_B, RECV_B, stage by stage, are our send_to and receive_from."""
    order, stages, _ = ORDERS[name]
    lowered = theirs._add_send_recv(translated(order), placement(order).__getitem__, stages)
    for rank, row in enumerate(lower(order, stages)):
        ours = set()
        for (stage, kind, microbatch), source, to in row:
            letter = "F" if kind is Kind.F else "B"
            ours |= {f"{stage}SEND_{letter}{microbatch}"} if to is not None else set()
            ours |= {f"{stage}RECV_{letter}{microbatch}"} if source is not None else set()
        assert ours == {str(a) for a in lowered[rank] if "_" in str(a)}
    theirs._simulate_comms_compute(lowered, placement(order).__getitem__, stages)


def test_both_refuse_a_cycle() -> None:
    order = parse_order(["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"])
    with pytest.raises(ScheduleError, match="rule 6"):
        validate(order, 2, 2)
    with pytest.raises(AssertionError):
        theirs._add_send_recv(translated(order), placement(order).__getitem__, 2)
