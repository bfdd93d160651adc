"""A stage: the layers that one rank holds, and what their forwards keep for their backwards.

The rules:
1. A stage builds its own layers and no others.
2. A microbatch goes forward once, then backward once; in between it is in flight, and the graph
   of its forward is kept. Backward uses that graph and frees it.
3. Gradients accumulate in `.grad` in the order in which backward is called.
4. A stage takes in one value (a tensor, or a tuple of tensors) and gives one. After the first
   stage, each floating-point input gets its gradient sent back, unless the caller says that the
   stage before has no use for it (`input_requires_grad`).
5. A stage owns what it is given after the first stage: a layer may write to it in place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from barepp import boundary
from barepp.boundary import Gradient, Value
from barepp.canonical import canonical_output
from barepp.errors import ScheduleError, UsageError
from barepp.models import LayerBuilder
from barepp.seeding import LayerRandomness

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(slots=True)
class _InFlight:
    """What a forward keeps: where its gradient will arrive, and the graph's end to start from."""

    leaves: Value
    output: Value


class Stage:
    """The layers `layer_range` of a model, as stage `index` of `num_stages`."""

    def __init__(
        self,
        index: int,
        layer_range: range,
        num_stages: int,
        builders: Sequence[LayerBuilder],
        loss_fn: LossFunction,
        *,
        seed: int,
        lock: threading.Lock | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.index = index
        self.layer_range = layer_range
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self.peak_in_flight = 0
        self._loss_fn = loss_fn
        self._randomness = LayerRandomness(seed, lock, device)
        self._in_flight: dict[int, _InFlight] = {}
        # The names are the layers' numbers in the whole model, so that a state_dict has the same
        # keys (`5.weight`) wherever the model is cut.
        self.layers = nn.ModuleDict(
            {str(layer): self._build(layer, builders[layer]) for layer in layer_range}
        )
        if device is not None:
            self.layers.to(device)  # built on the CPU: the same initial weights on each device
        self._numbered_layers = list(zip(layer_range, self.layers.values(), strict=True))

    def forward(
        self,
        microbatch: int,
        x: Value,
        *,
        step: int,
        target: Any = None,
        loss_weight: float = 1.0,
        input_requires_grad: Sequence[bool] | None = None,
    ) -> Value:
        """Run the layers on `x` and keep what backward needs.

        Returns the output, cut off its graph; the last stage returns the loss times `loss_weight`.
        With rows of the microbatch / rows of the batch as the weight, the losses of a batch, and
        the gradients with them, add up to those of the mean over the whole batch.

        `input_requires_grad` is what `output_requires_grad` was on the stage before. Without it
        all gradients are computed: also right, but behind a frozen stage it is work for nothing,
        and a layer may pick another kernel because of it. (A frozen nn.TransformerEncoderLayer in
        evaluation mode does, and rounds differently.)
        """
        if microbatch in self._in_flight:
            raise ScheduleError(
                f"stage {self.index}: a second forward of microbatch {microbatch} before its "
                "backward; let each microbatch go forward once, then backward"
            )
        num_tensors = len(boundary.tensors(x))
        wanted = input_requires_grad or [True] * num_tensors
        entered = boundary.enter(x, [False] * num_tensors if self.is_first else wanted)
        with self._randomness:
            output = self._run(entered.value, microbatch, step)
            if self.is_last:
                output = self._loss(output, target, microbatch, step) * loss_weight  # []
        self._in_flight[microbatch] = _InFlight(entered.leaves, output)
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        return boundary.leave(output)

    def backward(self, microbatch: int, gradient: Gradient = None) -> Gradient:
        """Use and free what forward kept; return the gradient of the stage's input.

        `gradient` is that of the stage's output; None on the last stage, which starts from its
        loss, and elsewhere where no gradient came back. None also comes out where none goes on.
        """
        kept = self._in_flight.pop(microbatch, None)
        if kept is None:
            raise ScheduleError(
                f"stage {self.index}: backward of microbatch {microbatch}, which is not in flight; "
                "its forward has to come first, and each forward has one backward"
            )
        if self.is_last:
            # Backward starts from d loss / d loss = 1. (`loss.backward()` makes the same tensor.)
            gradient = torch.ones_like(boundary.tensors(kept.output)[0])  # []
        try:
            # A turn of its own: a layer under torch.utils.checkpoint runs its forward again here.
            with self._randomness:
                boundary.backward(kept.output, gradient)
        except Exception as error:
            _add_note(error, f"in stage {self.index}, backward of microbatch {microbatch}")
            raise
        return boundary.gradient_of(kept.leaves)

    def evaluate(self, x: Value, *, microbatch: int = 0, step: int = 0) -> Value:
        """Run the layers on `x` without keeping anything; the last stage returns its output."""
        with torch.no_grad(), self._randomness:
            value = boundary.enter(x, [False] * len(boundary.tensors(x))).value
            return self._run(value, microbatch, step)

    def output_requires_grad(self, microbatch: int) -> tuple[bool, ...]:
        """Return for each tensor of the output of a microbatch in flight: has its gradient a use?

        False for integers, and where all is frozen from the first layer to here.
        """
        output = self._in_flight[microbatch].output
        return tuple(tensor.requires_grad for tensor in boundary.tensors(output))

    @property
    def in_flight(self) -> int:
        """How many microbatches have gone forward and not yet backward."""
        return len(self._in_flight)

    def clear(self) -> None:
        """Drop what is in flight, after a step that failed; the gradients stay as they are."""
        self._in_flight.clear()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters in layer order."""
        return self.layers.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) in layer order, named as in the model in one process."""
        return self.layers.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and buffers, named as in the model in one process."""
        return self.layers.state_dict()

    def train(self, mode: bool = True) -> None:
        """Put the layers in training mode: dropout drops, BatchNorm learns its averages."""
        self.layers.train(mode)

    def eval(self) -> None:
        """Put the layers in evaluation mode."""
        self.layers.eval()

    def _build(self, layer: int, builder: LayerBuilder) -> nn.Module:
        try:
            with self._randomness:
                self._randomness.seed_initial(layer)
                module = builder()
        except Exception as error:
            _add_note(error, f"while building layer {layer} of stage {self.index}")
            raise
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"the builder of layer {layer} returned {_type_name(module)}, not an nn.Module; "
                "give callables that build a layer, e.g. functools.partial(nn.Linear, 64, 128)"
            )
        return module

    def _run(self, value: Value, microbatch: int, step: int) -> Value:
        layer, module = self._numbered_layers[0]
        try:
            for layer, module in self._numbered_layers:
                self._randomness.seed_layer(layer, step, microbatch)
                value = self._checked_output(layer, module(value))
        except Exception as error:
            _add_note(
                error,
                f"in layer {layer} ({_type_name(module)}) of stage {self.index}, "
                f"forward of microbatch {microbatch}",
            )
            raise
        return value

    def _checked_output(self, layer: int, output: Any) -> Value:
        if isinstance(output, Tensor):
            return canonical_output(output)  # [rows, ...]
        if isinstance(output, tuple) and all(isinstance(item, Tensor) for item in output):
            return tuple(canonical_output(tensor) for tensor in output)
        raise UsageError(
            f"layer {layer} returned {_type_name(output)}; from layer to layer goes a tensor or a "
            "tuple of tensors"
        )

    def _loss(self, output: Value, target: Any, microbatch: int, step: int) -> Tensor:
        # A loss may draw random numbers too; it counts as the layer behind the last one.
        self._randomness.seed_layer(self.layer_range.stop, step, microbatch)
        try:
            loss = self._loss_fn(output, target)
        except Exception as error:
            _add_note(error, f"in the loss of microbatch {microbatch}, on stage {self.index}")
            raise
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            what = list(loss.shape) if isinstance(loss, Tensor) else _type_name(loss)
            raise UsageError(
                f"loss_fn returned {what}, not a 0-dimensional tensor; it must be a mean over rows"
            )
        return loss


def _type_name(thing: object) -> str:
    return type(thing).__name__


def _add_note(error: Exception, note: str) -> None:
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
