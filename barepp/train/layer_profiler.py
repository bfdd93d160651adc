"""Measures what each layer costs, one layer at a time: no process holds the whole model.

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
from dataclasses import dataclass
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
from barepp.train.stage.boundary import Gradient, Value, gradient_of, tensors
from barepp.train.stage.layers import LayerBuilder, LossFunction, add_note
from barepp.train.stage.recompute import copy_of
from barepp.train.stage.seeding import Compute
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
    # A loss may have parameters of its own, or count: it is the training's, like the layers.
    loss = _own_copy(lambda: loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
    if device is not None and device.type != "cpu":
        inputs, targets = moved(inputs, device, []), moved(targets, device, [])
        if isinstance(loss, nn.Module):
            loss.to(device)
    compute, clock = Compute(device, autocast, lock), clock_of(device)

    def stage_of(index: int, builders: Sequence[LayerBuilder]) -> Stage:
        alone = range(index, index + 1)
        return Stage(index, alone, len(builders), builders, loss, seed=seed, compute=compute)

    builders = [partial(_own_copy, builder) for builder in layers]
    value = copy_of(inputs)
    wanted: Sequence[bool] = [False] * len(tensors(value))
    kept = _storages(tensors(value))  # a batch is there anyway
    costs = []
    with _one_thread(), torch.enable_grad():
        one = torch.ones(1, device=device)  # [1]
        besides = _Run(stage_of(1, [_Scale] * 3), one, [True], None, clock).least_times(0.1)
        for index in range(len(layers)):
            try:
                run = _Run(stage_of(index, builders), value, wanted, targets, clock)
                took = run.least_times(budget_s / len(layers))
                kept, kept_nbytes = run.look(kept)
            except Exception as error:
                add_note(error, "while the layers were profiled for a balanced partition")
                raise
            value, wanted = run.output, run.output_wanted
            nbytes = (
                kept_nbytes,
                sum(tensor.nbytes for tensor in tensors(value)),
                sum(parameter.nbytes for parameter in run.stage.parameters()),
            )
            seconds = (max(0.0, own - other) for own, other in zip(took, besides, strict=True))
            costs.append(LayerCost._make((*seconds, *nbytes)))
    return costs


def balanced_sizes(
    layers: Sequence[LayerBuilder],
    loss_fn: LossFunction,
    sample: tuple[Value, Value] | None,
    schedule: Schedule,
    *,
    recomputed: Sequence[bool],
    memory_limit: int | None,
    seed: int,
    compute: Compute,
) -> torch.Tensor:
    """Profile the layers on the first microbatch of a sample batch, and `balance` them."""
    if sample is None:
        raise UsageError(
            'partition="balanced" measures the layers on the rank of the first stage: give it a '
            "batch as sample=(inputs, targets)"
        )
    sizes = microbatch_sizes(num_rows(sample[0]), schedule.num_microbatches)
    inputs, targets = (split(part, sizes)[0] for part in sample)
    costs = profile(layers, loss_fn, inputs, targets, seed=seed, **vars(compute))
    limit = math.inf if memory_limit is None else memory_limit
    return torch.tensor(balance(costs, schedule, recomputed=recomputed, memory_limit=limit))


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


@dataclass
class _Run:
    """The forwards and backwards of one microbatch through a stage of one layer."""

    stage: Stage
    value: Value
    wanted: Sequence[bool]
    target: Any
    clock: Clock
    output: Value = ()
    output_wanted: Sequence[bool] = ()  # which gradients of it have a use

    def least_times(self, share_s: float) -> list[float]:
        """Return the least seconds of forward, backward, input gradients and weight gradients."""
        began = time.perf_counter()
        runs: list[tuple[float, ...]] = []
        while len(runs) < LEAST_RUNS or (
            len(runs) < MOST_RUNS and time.perf_counter() - began < share_s
        ):
            runs.append(self._times())
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
            self._forward(self.value, split=False)  # no copy: the layer before may keep it too
        layer = self.stage.layers
        ours = _storages(itertools.chain(layer.parameters(), layer.buffers()))
        kept = _storages(saved)
        fresh = [kept[address] for address in kept.keys() - counted.keys() - ours.keys()]
        self.stage.clear()
        return kept, sum(storage.nbytes() for storage in fresh)

    def _times(self) -> tuple[float, ...]:
        stage, clock = self.stage, self.clock
        forward_s = self._forward(copy_of(self.value), split=False)  # a layer may write to its copy
        gradient = self._gradient()
        backward_s = took_s(clock, lambda: stage.backward(0, gradient))
        self._forward(copy_of(self.value), split=True)
        again = self._gradient()
        inputs_s = took_s(clock, lambda: stage.backward_inputs(0, again))
        weights_s = took_s(clock, lambda: stage.backward_weights(0))
        return forward_s, backward_s, inputs_s, weights_s

    def _forward(self, value: Value, *, split: bool) -> float:
        def forward() -> None:
            self.output = self.stage.forward(
                0, value, step=0, target=self.target, input_requires_grad=self.wanted, split=split
            )

        took = took_s(self.clock, forward)
        self.output_wanted = self.stage.output_requires_grad(0)
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
