"""Recompute: the same bits for less memory, each forward that counts counted once."""

import itertools
import random
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from stages import every_partition, forward, gradients, make_stages
from test_backward import MICROBATCHES, in_two_parts, now_and_then, train, whole
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO, layer, linear

import barepp
from barepp.errors import UsageError
from barepp.train.stage.recompute import RECOMPUTE, Buffers, is_recomputed, recompute_of_stages
from barepp.train.stage.seeding import Compute
from barepp.train.stage.stage import Stage


@pytest.mark.parametrize("name", ZOO)
def test_the_bits_are_the_same(name: str) -> None:
    model = ZOO[name]
    cuts = every_partition(len(model.layers))
    expected = train(model, cuts[0], whole)
    some = [cuts[0], cuts[-1], *random.Random(name).sample(cuts, 2)]
    ways: list[Callable] = [whole, partial(in_two_parts, delay=2), now_and_then]
    for cut, backwards in zip(some, itertools.cycle(ways), strict=False):
        found = train(model, cut, backwards, recompute=True, split=backwards is not whole)
        assert found == expected, f"{name} cut into {cut}"


class Counting(nn.Module):
    """Adds to a buffer in each forward, and its result depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.calls += 1
        return x * (self.calls + 0)  # torch refuses a backward whose buffer has changed since


def test_a_buffer_is_changed_once_and_seen_as_it_was() -> None:
    layers = [linear(4, 4), Counting, linear(4, 5)]
    (plain,), (again,) = make_stages(layers, [3]), make_stages(layers, [3])
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    for stage in (plain, again):
        for microbatch in range(3):
            stage.forward(microbatch, x, step=0, target=y, recompute=stage is again)
        buffer = stage.layers["1"].calls
        for microbatch in range(3):
            stage.backward(microbatch)
        assert stage.layers["1"].calls is buffer
        assert buffer == 3
    assert gradients([plain]) == gradients([again])
    assert (plain.layers["1"].runs, again.layers["1"].runs) == (3, 6)


def test_a_buffer_that_two_modules_share_stays_shared() -> None:
    one, other = Counting(), Counting()
    other.calls = one.calls
    both = nn.Sequential(one, other)
    buffers = Buffers(both)
    both(torch.ones(1))
    buffers.keep_changed()
    with buffers.as_they_were():
        assert one.calls is other.calls
        assert one.calls == 0
    assert one.calls is other.calls
    assert one.calls == 2


def test_a_buffer_is_put_back_when_the_second_forward_fails() -> None:
    def fail_at_last(x: Tensor) -> Tensor:
        if failing:
            raise ZeroDivisionError
        return x

    failing = False
    (stage,) = make_stages([Counting, layer(fail_at_last), linear(4, 5)], [3])
    buffer = stage.layers["0"].calls
    stage.forward(0, torch.randn(2, 4), step=0, target=torch.tensor([0, 1]), recompute=True)
    failing = True
    with pytest.raises(ZeroDivisionError):
        stage.backward(0)
    assert stage.layers["0"].calls is buffer
    assert buffer == 1


def saved_nbytes(stage: Stage, **options: bool) -> int:
    """What four forwards leave saved for their backwards, beyond the weights."""
    alive: weakref.WeakSet = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    y = torch.zeros(16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        for microbatch in range(MICROBATCHES):
            stage.forward(microbatch, torch.randn(16, 32), step=0, target=y, **options)
    weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    storages = {s.tensor.untyped_storage().data_ptr(): s.tensor.nbytes for s in alive}
    return sum(nbytes for storage, nbytes in storages.items() if storage not in weights)


def test_a_microbatch_in_flight_costs_its_input() -> None:
    layers = [linear(32, 32), nn.Tanh] * 8 + [linear(32, 5)]
    kept = saved_nbytes(make_stages(layers, [17])[0])
    recomputed = saved_nbytes(make_stages(layers, [17])[0], recompute=True)
    assert kept >= MICROBATCHES * 8 * 16 * 32 * 4
    assert recomputed == 0


def test_what_the_first_forward_saves_is_dropped_while_it_runs() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def look(x: Tensor) -> Tensor:
        nonlocal most
        doubled = x * 2
        alive.append(weakref.ref(doubled))
        most = max(most, sum(ref() is not None for ref in alive))
        return doubled * doubled  # saves both factors

    layers = [layer(look)] * 9 + [linear(4, 5)]
    for recompute, expected in ((False, 9), (True, 1)):
        alive.clear()
        most = 0
        (stage,) = make_stages([linear(4, 4), *layers], [11])
        x = torch.randn(2, 4)
        stage.forward(0, x, step=0, target=torch.tensor([0, 1]), recompute=recompute)
        assert most == expected


def test_layers_run_again_under_the_lock_and_once_more_only() -> None:
    lock = threading.Lock()
    held = []

    def look(x: Tensor) -> Tensor:
        held.append(lock.locked())
        return functional.dropout(x, 0.5)

    builders = [linear(4, 4), layer(look)]
    stage = Stage(
        1, range(2), 2, builders, lambda x, _: x.mean(), seed=0, compute=Compute(lock=lock)
    )
    x = torch.randn(2, 4)
    before = torch.default_generator.get_state()
    for microbatch in range(2):
        stage.forward(microbatch, x + microbatch, step=0, split=True, recompute=True)
    stage.backward(0)
    stage.backward_inputs(1)
    assert held == [True] * 4
    stage.backward_weights(1)
    assert held == [True] * 4
    assert not lock.locked()
    assert torch.equal(torch.default_generator.get_state(), before)


def test_the_second_forward_is_a_grad_mode_forward_wherever_it_is_called() -> None:
    modes = []

    def look(x: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return x

    (stage,) = make_stages([layer(look), linear(4, 5)], [2])
    stage.forward(0, torch.randn(2, 4), step=0, target=torch.tensor([0, 1]), recompute=True)
    with torch.no_grad():
        stage.backward(0)
    assert modes == [True, True]


def test_the_frozen_part_is_as_frozen_as_without() -> None:
    model = ZOO["frozen in front"]
    stages = make_stages(model.layers, [1, 2, 2])
    x, y = torch.randn(4, 12), torch.zeros(4, dtype=torch.long)
    forward(stages, x, y, step=0, recompute=True)
    assert [stage.output_requires_grad(0) for stage in stages] == [(False,), (False,), (True,)]


def test_which_microbatches_are_recomputed() -> None:
    table = {how: [is_recomputed(how, i, 3) for i in range(3)] for how in RECOMPUTE}
    assert table == {
        "off": [False, False, False],
        "all": [True, True, True],
        "all_but_last": [True, True, False],
    }
    assert recompute_of_stages("all", 3) == ["all"] * 3
    assert recompute_of_stages(["all", "off"], 2) == ["all", "off"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("some", "unknown recompute 'some'; there is: off, all, all_but_last"),
        (["all", "on"], "unknown recompute 'on'"),
        (["all"], r"has 1 entries, but there are 2 stages"),
    ],
)
def test_a_word_that_does_not_exist_is_named(how: str | list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recompute_of_stages(how, 2)


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        ("off", [4, 4]),
        ("all", [8, 8]),
        ("all_but_last", [7, 7]),
        (["off", "all"], [4, 8]),
    ],
)
def test_each_stage_recomputes_what_it_is_told_to(
    recompute: str | list[str], expected: list[int]
) -> None:
    runs = [0, 0]

    def counting(stage: int) -> Callable:
        def run(x: Tensor) -> Tensor:
            runs[stage] += 1
            return x

        return layer(run)

    def work(world: barepp.World) -> float:
        pipe = barepp.Pipeline(
            world,
            [counting(0), linear(6, 5), counting(1), linear(5, 5)],
            functional.cross_entropy,
            num_microbatches=4,
            recompute=recompute,
        )
        return float(pipe.step(torch.ones(8, 6), torch.zeros(8, dtype=torch.long)))

    barepp.run(work, 2, transport="inproc")
    assert runs == expected
