"""The front door: every shape of batch, every count of microbatches, and what must not happen."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from zoo import ZOO, WritingLinear
from zoo import data as zoo_data

import barepp
from barepp.bench.case import SleepyLinear
from barepp.errors import PartitionError, ScheduleError, UsageError
from barepp.plan.simulate import Costs, simulate
from barepp.train.messages import (
    copied,
    pack_activation,
    pack_gradient,
    unpack_activation,
    unpack_gradient,
)
from barepp.train.stage.stage import Stage
from transport.errors import ProtocolError
from transport.message.work import Send

SCHEDULES = ["naive", "gpipe", "1f1b"]  # the others: tests/train/test_exactness.py
cross_entropy = nn.functional.cross_entropy
run = functools.partial(barepp.run, transport="inproc")


def data(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 64, generator=generator)
    return images, torch.randint(0, 10, (rows,), generator=generator)


def reference_loss_and_gradients(num_layers, rows, num_microbatches):
    """What one process gets that accumulates the same microbatches: the definition of right."""
    [result] = run(step_once, 1, "1f1b", num_layers, rows, num_microbatches)
    return result


def step_once(world, schedule, num_layers, rows, num_microbatches):
    pipe = barepp.Pipeline(
        world,
        barepp.mlp(num_layers, 16),
        cross_entropy,
        schedule=schedule,
        num_microbatches=num_microbatches,
    )
    loss = pipe.step(*data(rows))
    assert loss.dim() == 0 and not loss.requires_grad
    return float(loss), {name: p.grad.clone() for name, p in pipe.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("rows", "num_microbatches"), [(1, 1), (7, 8), (8, 3), (9, 4), (16, 16)])
def test_a_step_is_what_one_process_does(schedule, world_size, rows, num_microbatches):
    loss, gradients = reference_loss_and_gradients(4, rows, num_microbatches)
    results = run(step_once, world_size, schedule, 4, rows, num_microbatches)
    merged = {}
    for rank_loss, rank_gradients in results:
        assert rank_loss == loss  # every rank gets it, to the bit
        merged.update(rank_gradients)
    assert merged.keys() == gradients.keys()
    assert all(torch.equal(merged[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("rows", [1, 5, 16, 23])
def test_loss_and_gradients_are_those_of_the_whole_batch(rows):
    images, labels = data(rows)
    whole = nn.Sequential()  # the one-process model, built from the pipeline's own state
    loss, gradients = reference_loss_and_gradients(4, rows, 8)
    [state] = run(
        lambda world: barepp.Pipeline(world, barepp.mlp(4, 16), cross_entropy).state_dict(), 1
    )
    for index, build in enumerate(barepp.mlp(4, 16)):
        whole.add_module(str(index), build())
    whole.load_state_dict(state)
    mean = cross_entropy(whole(images), labels)
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    for name, parameter in whole.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max()
        assert error <= 1e-5 * parameter.grad.abs().max()


def sizes_that_change(world, schedule):
    pipe = barepp.Pipeline(
        world, barepp.mlp(4, 16), cross_entropy, schedule=schedule, num_microbatches=4
    )
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    losses = []
    for step, rows in enumerate([16, 3, 16, 1, 7, 20]):
        pipe.zero_grad()
        losses.append(float(pipe.step(*data(rows, step))))
        optimizer.step()
    return losses, pipe.parameters_sha256()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_batch_size_may_change_at_every_step(schedule):
    [reference] = run(sizes_that_change, 1, schedule)
    assert run(sizes_that_change, 3, schedule) == [reference] * 3


def test_every_step_draws_other_masks():
    def losses(world):
        layers = [functools.partial(nn.Dropout, 0.5), functools.partial(nn.Linear, 64, 10)]
        pipe = barepp.Pipeline(world, layers, cross_entropy, num_microbatches=2)
        return [float(pipe.step(*data(8))) for _ in range(3)]

    [alone] = run(losses, 1)
    assert len(set(alone)) == 3
    assert run(losses, 2) == [alone] * 2


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_step_ends_when_all_that_it_sent_has_left(schedule, monkeypatch):
    waited = []

    class Noted(Send):
        def wait(self, timeout=None):
            waited.append(id(self))
            return super().wait(timeout)

    monkeypatch.setattr("transport.inproc.Send", Noted)

    def sent(world):
        pipe = barepp.Pipeline(world, barepp.mlp(4, 16), cross_entropy, schedule=schedule)
        works = []
        isend = world.transport.isend

        def noted(message, dst, tag=0):
            works.append(isend(message, dst, tag))
            return works[-1]

        world.transport.isend = noted
        pipe.step(*data(16))
        return [id(work) for work in works]

    for rank in run(sent, 3):
        assert len(rank) >= 8 and set(rank) <= set(waited)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "zb_v"])
def test_a_forward_is_told_whether_its_backward_comes_in_two_parts(schedule, monkeypatch):
    """Otherwise the bits are the same, but W computes all input gradients once more."""
    told = []
    forward = Stage.forward

    def noted(self, *args, split, **options):
        told.append(split)
        return forward(self, *args, split=split, **options)

    monkeypatch.setattr(Stage, "forward", noted)
    run(step_once, 2, schedule, 4, 8, 4)
    assert set(told) == {schedule != "1f1b"}


def test_data_is_needed_only_where_it_is_used():
    def work(world):
        images, labels = data(8)
        last = world.rank == world.world_size - 1
        pipe = barepp.Pipeline(world, barepp.mlp(4, 16), cross_entropy)
        return float(pipe.step(images if world.rank == 0 else None, labels if last else None))

    assert len(set(run(work, 3) + run(work, 1))) == 1


def test_forward_gives_the_output_to_the_last_rank_alone_and_keeps_nothing():
    images, _ = data(11)

    def work(world):
        pipe = barepp.Pipeline(world, barepp.mlp(4, 16), cross_entropy, num_microbatches=4)
        output = pipe.forward(images)
        assert all(stage.in_flight == 0 for stage in pipe.stages.values())
        return output

    [alone] = run(work, 1)
    assert alone.shape == (11, 10) and not alone.requires_grad
    *others, last = run(work, 3)
    assert others == [None, None]
    assert torch.equal(last, alone)


def test_evaluate_is_the_mean_loss_without_dropout_and_leaves_the_mode_alone():
    images, labels = data(11)

    def work(world):
        layers = [*barepp.mlp(3, 16)[:-1], lambda: nn.Dropout(0.5), lambda: nn.Linear(16, 10)]
        pipe = barepp.Pipeline(world, layers, cross_entropy)
        first, second = pipe.evaluate(images, labels), pipe.evaluate(images, labels)
        assert first == second
        assert all(stage.layers.training for stage in pipe.stages.values())
        return float(first)

    assert len(set(run(work, 3))) == 1
    assert run(work, 3)[0] == pytest.approx(run(work, 1)[0], rel=1e-6)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("targets", [None, 10, 12], ids=["none", "too few", "too many"])
def test_evaluate_wants_a_target_for_every_row(targets, world_size):
    images, labels = data(11)
    given = None if targets is None else torch.cat([labels, labels])[:targets]

    def work(world):
        # (This loss function would take any number of them.)
        pipe = barepp.Pipeline(world, barepp.mlp(4, 16), lambda output, target: output.sum())
        pipe.evaluate(images, given)

    found = f"{targets or 'no'} targets"
    failing(f"the batch has 11 inputs, but the last stage got {found}", work, world_size)


def test_state_dict_has_the_one_process_keys_and_loads_back():
    def work(world, state):
        pipe = barepp.Pipeline(world, barepp.mlp(4, 16), cross_entropy, seed=world.world_size)
        if state is not None:
            pipe.load_state_dict(state)
        return pipe.state_dict(), pipe.parameters_sha256()

    [(whole, sha256)] = run(work, 1, None)
    one_process = nn.Sequential(*(build() for build in barepp.mlp(4, 16)))
    assert list(whole) == list(one_process.state_dict())
    parts = run(work, 3, whole)
    assert {part_sha256 for _, part_sha256 in parts} == {sha256}
    assert {key for part, _ in parts for key in part} == set(whole)


def test_the_user_can_cut_the_layers_by_hand():
    def work(world):
        pipe = barepp.Pipeline(world, barepp.mlp(5, 16), cross_entropy, partition=[1, 4, 1])
        return [list(stage.layer_range) for stage in pipe.stages.values()], pipe.parameters_sha256()

    results = run(work, 3)
    assert [layers for layers, _ in results] == [[[0]], [[1, 2, 3, 4]], [[5]]]


def test_a_rank_builds_its_own_layers_and_no_others():
    built = []

    def layer(index):
        def build():
            built.append(index)
            return nn.Linear(8, 8)

        return build

    def work(world):
        pipe = barepp.Pipeline(world, [layer(i) for i in range(7)], cross_entropy)
        return [len(stage.layer_range) for stage in pipe.stages.values()]

    assert run(work, 3) == [[3], [2], [2]]
    assert sorted(built) == list(range(7))


@pytest.mark.parametrize("num_microbatches", [4, 12])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_peak_in_flight_is_what_the_schedule_says(schedule, num_microbatches):
    def work(world):
        pipe = barepp.Pipeline(
            world,
            barepp.mlp(4, 16),
            cross_entropy,
            schedule=schedule,
            num_microbatches=num_microbatches,
        )
        pipe.step(*data(24))
        return pipe.peak_in_flight

    theory = {
        "naive": [1] * 4,
        "gpipe": [num_microbatches] * 4,
        "1f1b": [min(num_microbatches, 4 - rank) for rank in range(4)],
    }
    assert run(work, 4) == theory[schedule]


class CountedBoundary(nn.Module):
    """Counts how many of its outputs are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def forward(self, x):
        made = x * 1.0
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made


@pytest.mark.parametrize("num_microbatches", [8, 32])
def test_1f1b_frees_its_boundary_tensors_as_it_goes(num_microbatches):
    def work(world):
        layers = [*barepp.mlp(2, 16)[:-1], CountedBoundary, lambda: nn.Linear(16, 10)]
        pipe = barepp.Pipeline(
            world, layers, cross_entropy, partition=[3, 1], num_microbatches=num_microbatches
        )
        pipe.step(*data(64))
        gc.collect()
        if world.rank != 0:
            return None
        counted = pipe.stages[0].layers["2"]
        return counted.most, len(counted.alive)

    most, left = run(work, 2)[0]
    assert most <= 3  # min(m, p - r) = 2 in flight, and the one that is being made
    assert left == 0


def test_gradients_accumulate_over_steps_until_zero_grad():
    def work(world):
        pipe = barepp.Pipeline(world, barepp.mlp(2, 16), cross_entropy)
        pipe.step(*data(8))
        once = [p.grad.clone() for p in pipe.parameters()]
        pipe.step(*data(8))
        twice = [p.grad.clone() for p in pipe.parameters()]
        pipe.zero_grad()
        assert all(p.grad is None for p in pipe.parameters())
        return all(torch.allclose(2 * a, b) for a, b in zip(once, twice, strict=True))

    assert all(run(work, 2))


def failing(message_part, work, world_size=2):
    with pytest.raises(barepp.JobFailed) as caught:
        run(work, world_size)
    failure = caught.value.failure
    assert message_part in failure.message
    assert failure.message.endswith(")") and "test_pipeline.py, line" in failure.message
    assert (failure.traceback, failure.exit_code) == ("", 2)


def test_wrong_input_is_a_sentence():
    def pipeline(world, layers=4, **options):
        return barepp.Pipeline(world, barepp.mlp(layers, 16), cross_entropy, **options)

    images, labels = data(8)
    failing("naive, gpipe, 1f1b", lambda w: pipeline(w, schedule="zigzag"))
    failing("microbatch", lambda w: pipeline(w, num_microbatches=0))
    failing("5", pipeline, world_size=6)
    failing("at least one row", lambda w: pipeline(w).step(None, labels))
    failing("at least one row", lambda w: pipeline(w).step(images[:0], labels[:0]))
    failing("8 inputs", lambda w: pipeline(w).step(images, labels[:7]))
    failing("no targets", lambda w: pipeline(w).step(images, None))
    for error in (PartitionError, ScheduleError):
        assert issubclass(error, UsageError)


def test_an_error_in_a_layer_reaches_every_rank_with_its_place():
    def broken(x):
        raise ValueError("not today")

    class Broken(nn.Module):
        forward = staticmethod(broken)

    layers = [lambda: nn.Linear(64, 8), Broken, lambda: nn.Linear(8, 10)]
    told = []

    def work(world):
        try:
            barepp.Pipeline(world, layers, cross_entropy).step(*data(8))
        except barepp.JobFailed as error:
            told.append((world.rank, error.failure.rank, error.doing))
            raise

    with pytest.raises(barepp.JobFailed) as caught:
        run(work, 3)
    failure = caught.value.failure
    assert failure.rank == 1 and failure.doing == "computing 1F0"
    assert "not today" in failure.message and "def broken" not in failure.message
    assert sorted(rank for rank, _, _ in told) == [0, 2]
    assert {of for _, of, _ in told} == {1}
    # Rank 2 may have been told earlier: while it waited for the number of rows, a broadcast, or
    # while it posted its receives.
    [doing] = {doing for rank, _, doing in told if rank == 2}
    words = ("waiting for the input of 2F0", "message from rank 1", "posting its receives")
    assert any(word in doing for word in words)


def test_a_failed_step_leaves_nothing_in_flight():
    def loss(output, target):
        if loss.broken:
            raise ValueError("once")
        return cross_entropy(output, target)

    loss.broken = True

    def work(world):
        pipe = barepp.Pipeline(world, barepp.mlp(2, 16), loss)
        with pytest.raises(ValueError, match="once"):
            pipe.step(*data(8))
        assert all(stage.in_flight == 0 for stage in pipe.stages.values())
        loss.broken = False
        return float(pipe.step(*data(8)))

    assert run(work, 1)[0] > 0


@pytest.mark.parametrize(
    "gradient",
    [
        torch.ones(2, 3),
        None,
        (torch.ones(2), torch.zeros(3)),
        (None, torch.ones(2), None),
        (None, None),
    ],
)
def test_a_gradient_survives_its_message(gradient):
    back = unpack_gradient(pack_gradient(gradient))
    if not isinstance(gradient, tuple):
        assert back is gradient
        return
    assert len(back) == len(gradient)
    for one, other in zip(back, gradient, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("wanted", [(True,), (False,)])
def test_an_activation_survives_its_message(is_tuple, wanted):
    tensor = torch.ones(2, 3)
    value = (tensor,) if is_tuple else tensor
    back, back_wanted = unpack_activation(pack_activation(value, wanted))
    assert isinstance(back, tuple) == is_tuple
    assert torch.equal(back[0] if is_tuple else back, tensor)
    assert back_wanted is None or tuple(back_wanted) == wanted
    assert back_wanted is not None or all(wanted)


@pytest.mark.parametrize("wanted", [(True, False), (False, False)])
def test_a_dict_survives_its_message_with_its_keys_and_their_order(wanted):
    value = {"später\n\0": torch.ones(2, 3), "": torch.arange(3)}
    message = pack_activation(value, wanted)
    assert all(isinstance(part, torch.Tensor) for part in message)  # all that can travel
    back, back_wanted = unpack_activation(copied(message))
    assert list(back) == list(value)
    assert all(torch.equal(back[key], value[key]) for key in value)
    assert tuple(back_wanted) == wanted
    assert unpack_activation(pack_activation({}, ())) == ({}, [])


def test_a_message_whose_keys_are_not_a_dicts_is_refused():
    flags, _, *rest = pack_activation({"a": torch.ones(1), "b": torch.ones(1)}, (True, True))
    for text in ("[1, 2]", '["a"]', '["a", "a"]', '{"a": 1, "b": 2}', '"ab"', "["):
        bad = torch.tensor(list(text.encode()), dtype=torch.uint8)
        with pytest.raises(ProtocolError, match="keys"):
            unpack_activation((flags, bad, *rest))


def test_inputs_targets_and_output_may_be_dicts_or_tuples():
    images, labels = data(9)
    batches = {
        "dict": ({"image": images, "index": torch.arange(9)}, {"label": labels, "weight": images}),
        "tuple": ((images, torch.arange(9)), (labels, images)),
    }

    def loss(output, target):
        output, target = (
            v if isinstance(v, tuple) else tuple(v.values()) for v in (output, target)
        )
        return cross_entropy(output[0], target[0]) + (output[1] * 0).float().mean()

    class First(nn.Linear):
        def forward(self, value):
            if isinstance(value, dict):
                return {**value, "image": super().forward(value["image"])}
            return super().forward(value[0]), value[1]

    def work(world, form):
        layers = [lambda: First(64, 8), lambda: First(8, 8), lambda: First(8, 10)]
        pipe = barepp.Pipeline(world, layers, loss, num_microbatches=4)
        inputs, targets = batches[form]
        first, last = world.rank == 0, world.rank == pipe.last_rank
        losses = [float(pipe.step(inputs if first else None, targets if last else None))]
        losses.append(float(pipe.evaluate(inputs, targets)))
        return losses, pipe.forward(inputs)

    [(losses, output)] = run(work, 1, "dict")
    assert torch.equal(output["index"], torch.arange(9))
    for form in batches:
        results = run(work, 3, form)
        assert [found for found, _ in results] == [losses] * 3
        assert [type(found) for _, found in results] == [
            type(None),
            type(None),
            type(batches[form][0]),
        ]


def test_the_rows_of_a_batchs_tensors_are_compared():
    images, labels = data(8)
    failing(
        "the tensors of a batch need the same number of rows: (8, 64), (7,)",
        lambda w: barepp.Pipeline(w, barepp.mlp(4, 16), cross_entropy).step(
            (images, labels[:7]), labels
        ),
    )


@pytest.mark.parametrize(
    ("schedule", "world_size", "num_stages", "last_rank"),
    [
        ("1f1b", 3, None, 2),
        ("zb_h1", 3, None, 2),
        ("interleaved_1f1b", 2, None, 1),
        ("interleaved_1f1b", 2, 6, 1),
        ("interleaved_1f1b", 1, 3, 0),
        ("zb_v", 2, None, 0),
    ],
)
def test_a_rank_holds_the_stages_that_the_schedule_gives_it(
    schedule, world_size, num_stages, last_rank
):
    usual = world_size * (2 if schedule in ("interleaved_1f1b", "zb_v") else 1)

    def work(world):
        pipe = barepp.Pipeline(
            world, barepp.mlp(6, 16), cross_entropy, schedule=schedule, num_stages=num_stages
        )
        assert pipe.schedule.num_stages == (num_stages or usual)
        assert pipe.last_rank == last_rank
        output = pipe.forward(data(5)[0])
        assert (output is None) == (world.rank != last_rank)
        names = [name for name, _ in pipe.named_parameters()]
        assert names == list(pipe.state_dict())
        return sorted(pipe.stages), names

    results = run(work, world_size)
    stages = num_stages or usual
    assert sorted(stage for held, _ in results for stage in held) == list(range(stages))
    assert len({name for _, names in results for name in names}) == 14


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zb_v"])
def test_a_stage_may_write_over_what_its_neighbour_on_the_same_rank_has_made(schedule):
    """Tanh needs its output again in backward, and the next stage writes to what it is given."""

    def work(world, schedule, options):
        layers = [lambda: nn.Linear(64, 8), nn.Tanh]
        layers += [lambda: WritingLinear(8, 8), lambda: nn.Linear(8, 10)]
        options = {"schedule": schedule, "num_stages": 2, **options}
        pipe = barepp.Pipeline(world, layers, cross_entropy, num_microbatches=3, **options)
        pipe.step(*data(8))
        return {name: p.grad for name, p in pipe.named_parameters()}

    apart = {name: grad for part in run(work, 2, "1f1b", {}) for name, grad in part.items()}
    for options in ({}, {"recompute": "all"}):
        [together] = run(work, 1, schedule, options)
        assert together.keys() == apart.keys()
        assert all(torch.equal(together[name], apart[name]) for name in apart)


def test_stages_that_a_schedule_cannot_place_are_a_sentence():
    def pipeline(world, **options):
        return barepp.Pipeline(world, barepp.mlp(6, 16), cross_entropy, **options)

    failing("3 stages need 3 ranks, not 2", lambda w: pipeline(w, num_stages=3))
    failing("multiple of 2", lambda w: pipeline(w, num_stages=3, schedule="interleaved_1f1b"))
    failing("two stages", lambda w: pipeline(w, num_stages=6, schedule="zb_v"))
    failing("unknown recompute 'on'", lambda w: pipeline(w, recompute="on"))
    failing("at least 1 stage", lambda w: pipeline(w, num_stages=0))


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_is_exact_through_the_pipeline(name):
    model = ZOO[name]

    def work(world):
        pipe = barepp.Pipeline(world, model.layers, cross_entropy, num_microbatches=3)
        mine = [p for p in pipe.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(mine, lr=1e-2) if mine else None
        for step in range(2):
            inputs, targets = zoo_data(model, 7, step)
            pipe.zero_grad()
            pipe.step(inputs, targets)
            if optimizer is not None:
                optimizer.step()
        return pipe.parameters_sha256()

    [alone] = run(work, 1)
    for world_size in range(2, min(4, len(model.layers)) + 1):
        assert run(work, world_size) == [alone] * world_size


def test_evaluate_leaves_a_single_layer_in_its_own_mode():
    def work(world):
        layers = [lambda: nn.Linear(64, 8), lambda: nn.BatchNorm1d(8), lambda: nn.Linear(8, 10)]
        pipe = barepp.Pipeline(world, layers, cross_entropy)
        frozen = pipe.stages[0].layers["1"]
        frozen.eval()
        pipe.evaluate(*data(8))
        return frozen.training, pipe.stages[0].layers["0"].training

    assert run(work, 1) == [(False, True)]


def test_a_pipeline_of_several_ranks_is_not_used_again_after_a_failed_step():
    images, labels = data(8)

    def work(world):
        pipe = barepp.Pipeline(world, barepp.mlp(4, 16), cross_entropy)
        last = world.rank == world.world_size - 1
        if last:
            with pytest.raises(UsageError, match="8 inputs"):
                pipe.step(None, labels[:7])
        pipe.step(images, labels)

    failing("a step of this pipeline failed", work)


@pytest.mark.xdist_group("timed")
@pytest.mark.parametrize("schedule", barepp.schedule_names())
def test_the_measured_bubble_is_the_predicted_one(schedule):
    stages = 8 if schedule in ("interleaved_1f1b", "zb_v") else 4

    def work(world):
        layers = [functools.partial(SleepyLinear, 64, 64, 0.04 / stages)] * (stages - 1)
        layers += [functools.partial(SleepyLinear, 64, 10, 0.04 / stages)]
        pipe = barepp.Pipeline(world, layers, cross_entropy, schedule=schedule, num_microbatches=4)
        for _ in range(3):
            pipe.step(*data(8))
        summary = barepp.summarise(world, pipe.recorder, pipe.peak_in_flight)
        whole = [
            c + w + m
            for c, w, m in zip(
                summary.computing_ms, summary.waiting_ms, summary.moving_ms, strict=True
            )
        ]
        return summary.bubble, max(whole), summary.step_ms

    order = barepp.make_schedule(schedule, stages, 4, 4).order
    # The data needs no gradient: nobody sleeps for that of the first stage's input.
    predicted = simulate(order, stages, Costs(backward_input=[0] + [1] * (stages - 1))).bubble
    # Hardly smaller: all idle time counts. Larger by what a busy machine adds to the waiting, which
    # says nothing of the bubble: so one quiet moment of several is enough.
    for _ in range(10):
        found = barepp.run(work, 4, transport="unix")
        for bubble, whole_ms, step_ms in found:
            assert predicted - 0.03 < bubble
            assert whole_ms == pytest.approx(step_ms, rel=0.5)
        if all(bubble < predicted + 0.15 for bubble, _, _ in found):
            break
    else:
        pytest.fail(f"a bubble of {predicted:.3f} was predicted, {found[0][0]:.3f} was measured")
