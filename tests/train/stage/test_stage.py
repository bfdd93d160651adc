"""Stages: however a model is cut, the numbers are those of one process, bit for bit."""

import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from stages import as_bytes, backward, carried, every_partition, forward, gradients, make_stages
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO, Lambda, Model, data, layer, linear

from barepp.errors import ScheduleError, UsageError
from barepp.train.batch import microbatch_sizes, split
from barepp.train.models import LayerBuilder, mlp
from barepp.train.stage.boundary import Value
from barepp.train.stage.seeding import Compute, derive_seed
from barepp.train.stage.stage import Stage

BATCHES = [(32, 4), (20, 3), (11, 4), (6, 6)]  # 8,8,8,8 · 7,7,6 · 3,3,3,2 · single rows
GRID = [
    pytest.param(name, *batch, id=f"{name}-{batch[0]}-{batch[1]}")
    for name, model in ZOO.items()
    for batch in BATCHES
    if model.rows_are_independent or batch != (6, 6)
]


def run_step(
    stages: list[Stage],
    batch: tuple[Tensor, Tensor],
    sizes: list[int],
    step: int,
    fill: bool = True,
) -> float:
    """One step: all forwards first when `fill`, else each microbatch there and back."""
    inputs, targets = batch
    parts = list(enumerate(zip(split(inputs, sizes), split(targets, sizes), strict=True)))
    loss = torch.zeros(())
    for microbatch, (x, y) in parts:
        weight = sizes[microbatch] / sum(sizes)
        loss += forward(stages, x, y, microbatch=microbatch, step=step, loss_weight=weight)
        if not fill:
            backward(stages, microbatch)
    if fill:
        for microbatch, _ in parts:
            backward(stages, microbatch)
    return loss.item()


def train(model: Model, cut: list[int], rows: int, microbatches: int, fill: bool = True) -> dict:
    """Three steps of AdamW; returns everything that must not depend on the cut.

    AdamW and not Adam: its weight decay tells a weight without a gradient from one with zeros.
    """
    stages = make_stages(model.layers, cut)
    optimizers = [
        torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        for stage in stages
        if (parameters := list(stage.parameters()))
    ]
    seen: dict = {"losses": [], "gradients": []}
    for step in range(3):
        sizes = microbatch_sizes(rows, microbatches)
        seen["losses"].append(run_step(stages, data(model, rows, step), sizes, step, fill))
        seen["gradients"].append(gradients(stages))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(stage.in_flight == 0 for stage in stages)
    assert all(stage.peak_in_flight == (len(sizes) if fill else 1) for stage in stages)
    seen["state"] = {k: as_bytes(v) for s in stages for k, v in s.state_dict().items()}
    inputs, _ = data(model, 8, 99)
    for stage in stages:
        stage.eval()
    seen["evaluation"] = as_bytes(evaluated(stages, inputs))
    return seen


def evaluated(stages: list[Stage], inputs: Value) -> Value:
    for stage in stages:
        inputs = carried(stage.evaluate(inputs))
    return inputs


@pytest.mark.parametrize(("name", "rows", "microbatches"), GRID)
def test_the_cut_does_not_matter(
    name: str, rows: int, microbatches: int, full_products: bool
) -> None:
    """Each cut, and each batch with a part of the cuts: with `--matrix=all`, with each of them."""
    model = ZOO[name]
    whole = train(model, [len(model.layers)], rows, microbatches)
    assert any(whole["gradients"][0].values())
    cuts = every_partition(len(model.layers))
    if not full_products:
        batches = BATCHES if model.rows_are_independent else BATCHES[:3]
        cuts = cuts[batches.index((rows, microbatches)) :: len(batches)]
    for cut in cuts:
        # BatchNorm's averages follow the order of the forwards, which is the same in both.
        split_run = train(model, cut, rows, microbatches, fill=len(cut) % 2 == 0)
        for what in whole:
            assert split_run[what] == whole[what], f"{what} of {name} cut into {cut}"


def full_batch_gradients(model: Model, stage: Stage, rows: int) -> dict[str, Tensor | None]:
    inputs, targets = data(model, rows, 0)
    x = inputs
    for module in stage.layers.values():
        x = module(x)
    functional.cross_entropy(x, targets).backward()
    found = {name: parameter.grad for name, parameter in stage.named_parameters()}
    for parameter in stage.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize(("rows", "microbatches"), [*BATCHES, (5, 1), (7, 50)])
@pytest.mark.parametrize(
    "name", [n for n, m in ZOO.items() if m.rows_are_independent and not m.draws]
)
def test_gradients_are_those_of_the_mean_over_the_batch(
    name: str, rows: int, microbatches: int
) -> None:
    model = ZOO[name]
    (stage,) = make_stages(model.layers, [len(model.layers)])
    expected = full_batch_gradients(model, stage, rows)
    run_step([stage], data(model, rows, 0), microbatch_sizes(rows, microbatches), 0)
    for parameter_name, parameter in stage.named_parameters():
        full = expected[parameter_name]
        if full is None:
            assert parameter.grad is None
        else:
            assert (parameter.grad - full).abs().max() <= 1e-5 * full.abs().max()


def test_a_plain_torch_loop_gives_the_same_bits() -> None:
    layers, seed, sizes = mlp(4, 32, in_features=64, num_classes=10), 3, [7, 7, 6]
    modules = []
    for i, build in enumerate(layers):
        torch.manual_seed(derive_seed(seed, "init", i))
        modules.append(build())
    model = nn.Sequential(*modules)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    (stage,) = make_stages(layers, [5], seed)
    stage_adam = torch.optim.Adam(stage.parameters(), lr=0.01)
    for step in range(5):
        inputs, targets = torch.randn(20, 64), torch.randint(0, 10, (20,))
        for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True):
            (functional.cross_entropy(model(x), y) * (len(x) / 20)).backward()
        adam.step()
        adam.zero_grad()
        run_step([stage], (inputs, targets), sizes, step)
        stage_adam.step()
        stage_adam.zero_grad()
    ours, plain = stage.state_dict(), model.state_dict()
    assert list(ours) == list(plain)
    assert all(as_bytes(ours[name]) == as_bytes(plain[name]) for name in plain)


def test_keys_and_parameters_are_in_layer_order() -> None:
    layers = mlp(11, 4, 4, 4)
    stages = make_stages(layers, [3, 5, 4])
    keys = [f"{i}.{name}" for i in range(12) for name in ("weight", "bias")]
    assert [k for stage in stages for k in stage.state_dict()] == keys
    assert [k for stage in stages for k, _ in stage.named_parameters()] == keys
    for stage in stages:
        for (_, named), parameter in zip(stage.named_parameters(), stage.parameters(), strict=True):
            assert named is parameter


def test_a_stage_builds_its_own_layers_only() -> None:
    built = []

    def build(i: int) -> nn.Module:
        built.append(i)
        return nn.Linear(2, 2)

    stage = Stage(1, range(3, 6), 3, [partial(build, i) for i in range(9)], nn.MSELoss(), seed=0)
    assert built == [3, 4, 5]
    assert next(iter(stage.state_dict())) == "3.weight"


def test_train_and_eval_reach_the_layers() -> None:
    (stage,) = make_stages([linear(4, 4), partial(nn.Dropout, 0.5)], [2])
    x = torch.randn(6, 4)
    assert (stage.evaluate(x) == 0).any()
    stage.eval()
    assert not (stage.evaluate(x) == 0).any()
    stage.train()
    assert torch.equal(stage.evaluate(x), stage.evaluate(x))
    assert not torch.equal(stage.evaluate(x), stage.evaluate(x, microbatch=1))


def test_evaluate_keeps_nothing() -> None:
    stages = make_stages(ZOO["mlp"].layers, [2, 3])
    output = evaluated(stages, torch.randn(6, 13))
    assert output.shape == (6, 5)
    assert not stages[1].evaluate(torch.randn(6, 17)).requires_grad
    assert [stage.peak_in_flight for stage in stages] == [0, 0]


# What is kept, and until when.


class Recorder(nn.Module):
    """Remembers, weakly, what passes."""

    def __init__(self, passed: list[weakref.ref]) -> None:
        super().__init__()
        self.passed = passed

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.5
        self.passed += [weakref.ref(x), weakref.ref(y)]
        return y


@pytest.mark.parametrize("release", ["backward", "clear"])
def test_what_a_forward_kept_is_freed(release: str) -> None:
    passed: list[weakref.ref] = []
    layers = [linear(4, 4), partial(Recorder, passed), linear(4, 4), partial(Recorder, passed)] * 2
    stages = make_stages(layers, [3, 3, 2])
    gc.disable()  # the memory must go at once, and not when the collector happens to pass
    try:
        for microbatch in range(3):
            x = torch.randn(2, 4)
            for stage in stages:
                passed.append(weakref.ref(x))
                x = stage.forward(microbatch, x, step=0, target=torch.tensor([0, 1]))
        del x
        assert [stage.in_flight for stage in stages] == [3, 3, 3]
        alive = sum(ref() is not None for ref in passed)
        assert alive > 0
        for microbatch in range(3):
            if release == "backward":
                gradient = None
                for stage in reversed(stages):
                    gradient = stage.backward(microbatch, gradient)
                still_alive = sum(ref() is not None for ref in passed)
                assert still_alive == alive * (2 - microbatch) // 3
        if release == "clear":
            for stage in stages:
                stage.clear()
        assert not any(ref() is not None for ref in passed)
    finally:
        gc.enable()
    assert [stage.in_flight for stage in stages] == [0, 0, 0]
    assert [stage.peak_in_flight for stage in stages] == [3, 3, 3]


def test_backward_may_be_called_in_any_order_of_microbatches() -> None:
    stages = make_stages(ZOO["mlp"].layers, [2, 3])
    for microbatch in range(3):
        forward(stages, torch.randn(2, 13), torch.tensor([0, 1]), microbatch=microbatch, step=0)
    for microbatch, left in ((1, 2), (0, 1), (2, 0)):
        backward(stages, microbatch)
        assert [stage.in_flight for stage in stages] == [left, left]


# Gradients at the boundary.


def test_integers_and_unused_inputs_get_no_gradient() -> None:
    model = ZOO["tuples"]
    stages = make_stages(model.layers, [3, 1])
    inputs, targets = data(model, 4, 0)
    value = stages[0].forward(0, inputs, step=0)
    assert [item.dtype for item in value] == [
        torch.float32,
        torch.float32,
        torch.int64,
        torch.float32,
    ]
    assert not any(item.requires_grad for item in value)
    assert stages[0].output_requires_grad(0) == (True, True, False, True)
    stages[1].forward(0, value, step=0, target=targets)
    gradient = stages[1].backward(0)
    assert [item is None for item in gradient] == [False, False, True, True]
    stages[0].backward(0, gradient)
    assert stages[0].layers["0"].left.weight.grad is not None
    assert stages[0].layers["0"].unused.weight.grad is None


def test_an_input_that_is_used_gets_its_gradient_even_behind_frozen_layers() -> None:
    model = ZOO["frozen in front"]
    stages = make_stages(model.layers, [1, 1, 3])
    inputs, targets = data(model, 4, 0)
    x = inputs
    for stage in stages:  # nobody says whether the stage before has a use for the gradient
        x = stage.forward(0, x, step=0, target=targets)
    assert [stage.output_requires_grad(0) for stage in stages] == [(False,), (True,), (True,)]
    gradient = stages[2].backward(0)
    assert gradient.shape == (4, 9)
    gradient = stages[1].backward(0, gradient)
    assert gradient.shape == (4, 9)
    assert stages[0].backward(0, gradient) is None


def test_no_gradient_is_computed_for_a_stage_that_has_no_use_for_it() -> None:
    model = ZOO["frozen in front"]
    stages = make_stages(model.layers, [1, 2, 2])
    forward(stages, *data(model, 4, 0), step=0)
    assert [stage.output_requires_grad(0) for stage in stages] == [(False,), (False,), (True,)]
    backward(stages, 0)
    assert stages[2].layers["4"].weight.grad is not None


def test_a_boundary_without_a_gradient_leaves_the_weights_before_it_alone() -> None:
    model = ZOO["cut off"]
    stages = make_stages(model.layers, [2, 2])
    forward(stages, *data(model, 4, 0), step=0)
    assert stages[1].backward(0) is None
    assert stages[0].backward(0, None) is None
    assert all(parameter.grad is None for parameter in stages[0].parameters())
    assert stages[0].in_flight == 0


def test_what_enters_and_leaves_is_canonical() -> None:
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x.t()

    stages = make_stages([layer(look), layer(look), layer(look), linear(7, 5)], [1, 2, 1])
    x = torch.randn(43)[1:].view(6, 7)
    for stage in stages[:2]:
        x = stage.forward(0, x, step=0)
        seen.append(x)
    assert len(seen) == 5
    assert all(t.is_contiguous() and t.data_ptr() % 64 == 0 for t in seen)
    gradient = stages[1].backward(0, torch.randn(6, 7).t())
    assert gradient.is_contiguous()


def test_the_users_tensors_are_left_as_they_are() -> None:
    (stage,) = make_stages([linear(4, 2)], [1])
    x = torch.randn(3, 4, requires_grad=True)
    loss = stage.forward(0, x, step=0, target=torch.tensor([0, 1, 0]))
    stage.backward(0)
    assert not loss.requires_grad
    assert x.grad is None


# Random numbers.


def test_the_users_random_numbers_are_those_of_plain_torch() -> None:
    def user_draws(with_stages: bool) -> list[Tensor]:
        torch.manual_seed(11)
        numbers = [torch.randperm(9)]
        model = ZOO["checkpointed"]
        stages = make_stages(model.layers, [2, 2]) if with_stages else []
        for step in range(3):
            numbers += [torch.randperm(9), torch.randn(1)]
            if stages:
                run_step(stages, data(model, 11, step), [6, 5], step)
                evaluated(stages, data(model, 3, 0)[0])
        return numbers

    assert all(map(torch.equal, user_draws(True), user_draws(False)))


def test_masks_differ_between_layers_steps_and_microbatches() -> None:
    masks = []

    def dropout(x: Tensor) -> Tensor:
        masks.append(functional.dropout(torch.ones(64), 0.5))
        return x

    stages = make_stages([layer(dropout), layer(dropout), layer(dropout), linear(4, 5)], [1, 2, 1])
    for step in range(2):
        run_step(stages, (torch.randn(4, 4), torch.zeros(4, dtype=torch.long)), [2, 2], step)
    assert len(masks) == 12
    assert not any(map(torch.equal, *zip(*itertools.combinations(masks, 2), strict=True)))


def test_layers_run_and_are_built_under_the_lock() -> None:
    lock = threading.Lock()
    held = []

    def build() -> nn.Module:
        held.append(lock.locked())
        return Lambda(looking)

    def looking(x: Tensor) -> Tensor:
        held.append(lock.locked())
        y = x * 1
        if y.requires_grad:
            y.register_hook(lambda _: held.append(lock.locked()))
        return y

    stage = Stage(
        1, range(1, 2), 2, [build, build], lambda x, _: x.mean(), seed=0, compute=Compute(lock=lock)
    )
    stage.forward(0, torch.randn(2, 2), step=0)
    stage.backward(0)
    stage.evaluate(torch.randn(2, 2))
    assert held == [True] * 4
    assert not lock.locked()


# Mistakes.


def test_backward_without_forward_is_named() -> None:
    stage = make_stages(ZOO["mlp"].layers, [2, 3])[1]
    with pytest.raises(ScheduleError, match=r"stage 1: backward of microbatch 4.*not in flight"):
        stage.backward(4)
    stage.forward(4, torch.randn(2, 17), step=0, target=torch.tensor([0, 1]))
    stage.backward(4)
    with pytest.raises(ScheduleError, match="stage 1: backward of microbatch 4"):
        stage.backward(4)


def test_a_second_forward_is_named() -> None:
    stage = make_stages(ZOO["mlp"].layers, [2, 3])[0]
    stage.forward(2, torch.randn(2, 13), step=0)
    with pytest.raises(ScheduleError, match="stage 0: a second forward of microbatch 2"):
        stage.forward(2, torch.randn(2, 13), step=0)
    assert stage.in_flight == 1


@pytest.mark.parametrize(
    ("layers", "loss_fn", "message"),
    [
        ([layer(lambda x: [x])], nn.CrossEntropyLoss(), "layer 0 returned list"),
        ([layer(lambda x: (x, None))], nn.CrossEntropyLoss(), "layer 0 returned tuple"),
        ([linear(4, 5)], nn.CrossEntropyLoss(reduction="none"), r"loss_fn returned \[3\]"),
        ([linear(4, 5)], lambda *_: 1.0, "loss_fn returned float"),
    ],
)
def test_what_is_no_layer_and_no_loss_is_named(
    layers: list[LayerBuilder], loss_fn: Callable, message: str
) -> None:
    (stage,) = make_stages(layers, [1], loss_fn=loss_fn)
    with pytest.raises(UsageError, match=message):
        stage.forward(0, torch.randn(3, 4), step=0, target=torch.tensor([0, 1, 2]))
    assert stage.in_flight == 0


def test_a_builder_that_builds_no_layer_is_named() -> None:
    with pytest.raises(UsageError, match="builder of layer 1 returned Tensor"):
        make_stages([linear(4, 5), lambda: torch.zeros(3)], [2])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from 3.11 on")
@pytest.mark.parametrize("where", ["build", "forward", "backward", "loss"])
def test_an_error_in_the_users_code_says_where(where: str) -> None:
    def fail(*_: object) -> Tensor:
        raise ZeroDivisionError("on purpose")

    def layer_that_fails(x: Tensor) -> Tensor:
        if where == "forward":
            fail()
        y = x * 1
        if where == "backward":
            y.register_hook(fail)
        return y

    def build() -> nn.Module:
        return fail() if where == "build" else Lambda(layer_that_fails)

    builders = [linear(4, 4), linear(4, 4), build]
    loss_fn = fail if where == "loss" else functional.cross_entropy
    with pytest.raises(ZeroDivisionError) as caught:
        stage = Stage(1, range(1, 3), 2, builders, loss_fn, seed=0)
        stage.forward(3, torch.randn(2, 4), step=0, target=torch.tensor([0, 1]))
        stage.backward(3)
    assert caught.value.__notes__ == [
        {
            "build": "while building layer 2 of stage 1",
            "forward": "in layer 2 (Lambda) of stage 1, forward of microbatch 3",
            "backward": "in stage 1, backward of microbatch 3",
            "loss": "in the loss of microbatch 3, on stage 1",
        }[where]
    ]
