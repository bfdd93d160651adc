"""Measures what each layer costs, one layer after the other, so that nobody holds the whole model.

    layer k:   build ──> forward, backward (several times) ──> drop
               inputs ──┘       └──> the inputs of layer k + 1

1. Each layer is measured as a stage of its own, by the code that will train it; the last one has
   the loss. What a stage costs besides its layers is measured on one that does next to nothing, and
   taken off.
2. Each time is the least of several runs, the first of which warms up and does not count: what else
   a machine does can only make a run longer.
3. What is measured is a copy of what the builder returns, under the layer's own seed, and of a loss
   that is a module; torch's generator is put back: neither parameters nor random numbers of the
   training are touched. On a GPU the times are the device's (device_clock.py).
4. Bounded: every layer runs forwards and backwards three times or more, up to `MOST_RUNS` while its
   share of `budget_s` lasts.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from barepp.errors import UsageError
from barepp.plan.balance import balance
from barepp.plan.layer_costs import LayerCost
from barepp.schedules import Schedule
from barepp.trace.device_clock import Clock, clock_of, took_s
from barepp.train.batch import microbatch_sizes, moved, num_rows, split
from barepp.train.models import LayerBuilder
from barepp.train.stage.boundary import Gradient, Value, gradient_of, tensors
from barepp.train.stage.layers import LossFunction, add_note
from barepp.train.stage.recompute import copy_of
from barepp.train.stage.stage import Stage

LEAST_RUNS: Final = 3
MOST_RUNS: Final = 20

Storages = dict[int, torch.UntypedStorage]  # by address


def profile(
    layers: Sequence[LayerBuilder],
    loss_fn: LossFunction,
    inputs: Value,
    targets: Any,
    *,
    seed: int = 0,
    budget_s: float = 10.0,
    lock: threading.Lock | None = None,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
) -> list[LayerCost]:
    """Return what each layer costs for one microbatch, which is `inputs` and `targets`.

    Blocks for some runs of the whole model, one layer at a time, with one compute thread. `seed` is
    the pipeline's, and so are `device`, by default the CPU, and `autocast`; `lock` is held around
    whatever draws random numbers, where ranks are threads.
    """

    def stage_of(index: int, builders: Sequence[LayerBuilder]) -> Stage:
        alone = range(index, index + 1)
        more: dict[str, Any] = {"lock": lock, "device": device, "autocast": autocast}
        return Stage(index, alone, len(builders), builders, loss, seed=seed, **more)

    def run_of(stage: Stage, value: Value, wanted: Sequence[bool], target: Any) -> _Run:
        return _Run(stage, value, wanted, target, clock)

    builders = [partial(_own_copy, builder) for builder in layers]
    # It may have parameters of its own, or count: it is the training's, like the layers.
    loss = _own_copy(lambda: loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
    clock = clock_of(device)
    if device is not None and device.type != "cpu":
        inputs, targets = moved(inputs, device, []), moved(targets, device, [])
        if isinstance(loss, nn.Module):
            loss.to(device)
    value = copy_of(inputs)
    wanted: Sequence[bool] = [False] * len(tensors(value))
    kept = _storages(tensors(value))  # a batch is there anyway
    costs = []
    with _one_thread(), torch.enable_grad():
        one = torch.ones(1, device=device)
        besides = run_of(stage_of(1, [_Scale] * 3), one, [True], None).least_times(0.1)
        for index in range(len(layers)):
            try:
                run = run_of(stage_of(index, builders), value, wanted, targets)
                took = run.least_times(budget_s / len(layers))
                kept, kept_nbytes = run.look(kept)
            except Exception as error:
                add_note(error, "while the layers were profiled for a balanced partition")
                raise
            forward_s, backward_s, inputs_s, weights_s = (
                max(0.0, one - other) for one, other in zip(took, besides, strict=True)
            )
            costs.append(
                LayerCost(
                    forward_s,
                    backward_s,
                    inputs_s,
                    weights_s,
                    kept_nbytes,
                    sum(tensor.nbytes for tensor in tensors(run.output)),
                    run.parameter_nbytes,
                )
            )
            value, wanted = run.output, run.output_wanted
    return costs


def balanced_sizes(
    layers: Sequence[LayerBuilder],
    loss_fn: LossFunction,
    sample: tuple[Value, Value] | None,
    schedule: Schedule,
    *,
    recomputed: Sequence[bool] = (),
    memory_limit: int | None = None,
    seed: int = 0,
    lock: threading.Lock | None = None,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
) -> list[int]:
    """Profile the layers on the first microbatch of a sample batch, and `balance` them."""
    if sample is None:
        raise UsageError(
            'partition="balanced" measures the layers on the rank of the first stage: give it a '
            "batch as sample=(inputs, targets)"
        )
    sizes = microbatch_sizes(num_rows(sample[0]), schedule.num_microbatches)
    inputs, targets = (split(part, sizes)[0] for part in sample)
    costs = profile(
        layers,
        loss_fn,
        inputs,
        targets,
        seed=seed,
        lock=lock,
        device=device,
        autocast=autocast,
    )
    limit = math.inf if memory_limit is None else memory_limit
    return balance(costs, schedule, recomputed=recomputed, memory_limit=limit)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Scale(nn.Module):
    """The least that a stage can do forwards, and in both parts of its backward."""

    plain = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale  # [1]


class _Run:
    """The forwards and backwards of one microbatch through a stage of one layer."""

    def __init__(
        self, stage: Stage, value: Value, wanted: Sequence[bool], target: Any, clock: Clock
    ) -> None:
        self._stage = stage
        self._value = value
        self._wanted = wanted
        self._target = target
        self._clock = clock
        self.output: Value = ()
        self.output_wanted: Sequence[bool] = ()  # which gradients of it have a use

    @property
    def parameter_nbytes(self) -> int:
        """The size of the layer's parameters."""
        return sum(parameter.nbytes for parameter in self._stage.parameters())

    def least_times(self, share_s: float) -> list[float]:
        """Return the least seconds of forward, backward, input gradients and weight gradients."""
        began = time.perf_counter()
        runs: list[tuple[float, ...]] = []
        while len(runs) < LEAST_RUNS or (
            len(runs) < MOST_RUNS and time.perf_counter() - began < share_s
        ):
            runs.append((*self._whole(), *self._in_two_parts()))
        return [min(times) for times in zip(*runs[1:], strict=True)]

    def look(self, counted: Storages) -> tuple[Storages, int]:
        """Return what autograd keeps of a forward, and its size, without what is counted already.

        (The output of a ReLU is kept by the ReLU and by the linear layer behind it.)
        """
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._forward(self._value, split=False)  # no copy: the layer before may keep it too
        layer = self._stage.layers
        ours = _storages(itertools.chain(layer.parameters(), layer.buffers()))
        kept = _storages(saved)
        fresh = [kept[address] for address in kept.keys() - counted.keys() - ours.keys()]
        self._stage.clear()
        return kept, sum(storage.nbytes() for storage in fresh)

    # Each forward below has a copy of the input: a layer may write to what it is given.

    def _whole(self) -> tuple[float, float]:
        forward_s = self._forward(copy_of(self._value), split=False)
        gradient = self._gradient()
        return forward_s, took_s(self._clock, lambda: self._stage.backward(0, gradient))

    def _in_two_parts(self) -> tuple[float, float]:
        self._forward(copy_of(self._value), split=True)
        gradient = self._gradient()
        inputs_s = took_s(self._clock, lambda: self._stage.backward_inputs(0, gradient))
        return inputs_s, took_s(self._clock, lambda: self._stage.backward_weights(0))

    def _forward(self, value: Value, *, split: bool) -> float:
        def forward() -> None:
            self.output = self._stage.forward(
                0,
                value,
                step=0,
                target=self._target,
                input_requires_grad=self._wanted,
                split=split,
            )

        took = took_s(self._clock, forward)
        self.output_wanted = self._stage.output_requires_grad(0)
        return took

    def _gradient(self) -> Gradient:
        """Return a gradient of the output, of some numbers: its shape is what takes time."""
        found = [
            torch.ones_like(tensor) if wanted else None
            for tensor, wanted in zip(tensors(self.output), self.output_wanted, strict=True)
        ]
        return gradient_of(isinstance(self.output, Tensor), found)


def _own_copy(builder: LayerBuilder) -> nn.Module:
    # A builder may return a module that exists already and is to be trained.
    module = builder()
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever the module's own attributes raise
        raise UsageError(
            f"a module of type {type(module).__name__} cannot be copied ({error}), and a balanced "
            "partition measures copies: give the number of layers of each stage instead"
        ) from error


def _storages(of: Iterable[Tensor]) -> Storages:
    storages = (tensor.untyped_storage() for tensor in of)
    return {storage.data_ptr(): storage for storage in storages}
