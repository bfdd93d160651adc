"""A stage: the layers that one rank holds, and what their forwards keep for their backwards.

The rules:
1. A stage builds its own layers and no others.
2. A microbatch goes forward once, then backward once: whole (`backward`), or first for its input
   (`backward_inputs`) and later for its weights (`backward_weights`). In between it is in flight,
   and the graph of its forward is kept, or its input if it is to be recomputed. Backward uses
   that and frees it.
3. Gradients accumulate in `.grad` in the order in which `backward` and `backward_weights` are
   called.
4. A stage takes in one value (a tensor, or a tuple or dict of tensors) and gives one. After the
   first stage, each floating-point input gets its gradient sent back, unless the caller says that
   the stage before has no use for it (`input_requires_grad`).
5. A stage owns what it is given after the first stage: a layer may write to it in place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from barepp.errors import ScheduleError
from barepp.train.models import LayerBuilder
from barepp.train.stage import boundary
from barepp.train.stage.autocast import autocast_for, scaled_start
from barepp.train.stage.backward import Backward, Graph, InPlaceWrites
from barepp.train.stage.boundary import Gradient, Value, tensors
from barepp.train.stage.layers import Layers, LossFunction, Turn, add_note
from barepp.train.stage.recompute import Buffers, copy_of, forgetting
from barepp.train.stage.seeding import LayerRandomness

_NO_TURN: Final = contextlib.nullcontext()


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
        autocast: torch.dtype | None = None,
    ) -> None:
        self.index = index
        self.layer_range = layer_range
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self.peak_in_flight = 0
        self._randomness = LayerRandomness(seed, lock, device)
        self._autocast = autocast_for(device, autocast)
        self._takes_turns = autocast is not None and lock is not None  # autocast.py, rule 3
        self._in_flight: dict[int, InFlight] = {}
        loss = loss_fn if self.is_last else None
        self._layers = Layers(
            index, layer_range, builders, loss, randomness=self._randomness, device=device
        )
        self.layers: nn.ModuleDict = self._layers.modules

    def forward(
        self,
        microbatch: int,
        x: Value,
        *,
        step: int,
        target: Any = None,
        loss_weight: float = 1.0,
        loss_scale: float = 1.0,
        input_requires_grad: Sequence[bool] | None = None,
        split: bool = False,
        recompute: bool = False,
    ) -> Value:
        """Run the layers on `x` and keep what backward needs.

        Returns the output, cut off its graph; the last stage returns the loss times `loss_weight`.
        With rows of the microbatch / rows of the batch as the weight, the losses of a batch, and
        the gradients with them, add up to those of the mean over the whole batch. Its backward
        starts from `loss_scale`; the loss itself is as it is.

        `input_requires_grad` is what `output_requires_grad` was on the stage before. Without it
        all gradients are computed: also right, but behind a frozen stage it is work for nothing,
        and a layer may pick another kernel because of it. (A frozen nn.TransformerEncoderLayer in
        evaluation mode does, and rounds differently.)

        `split` prepares for a backward in two parts (either kind of backward is right without it,
        but a W would compute all input gradients again); with `recompute` only `x` is kept, and
        backward runs the layers once more.
        """
        if microbatch in self._in_flight:
            raise ScheduleError(
                f"stage {self.index}: a second forward of microbatch {microbatch} before its "
                "backward; let each microbatch go forward once, then backward"
            )
        if self.is_first:
            wanted: Sequence[bool] = [False] * len(tensors(x))
        else:
            wanted = input_requires_grad or [True] * len(tensors(x))
        turn = Turn(microbatch, step, target, loss_weight)
        run = self._run_and_forget if recompute else self._run
        turn_at = self._turn(step)
        with turn_at if self._autocast is None else self._autocast.within(turn_at):
            kept, output = run(x, wanted, turn, split)
        needed = tuple([tensor.requires_grad for tensor in tensors(output)])
        start = None
        if self.is_last:
            loss = tensors(output)[0]
            # (`loss.backward()` makes the same tensor.)
            plain = loss_scale == 1.0
            start = torch.ones_like(loss) if plain else scaled_start(loss, loss_scale)  # []
        self._in_flight[microbatch] = InFlight(kept, isinstance(x, Tensor), needed, start, step)
        self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight))
        return boundary.leave(output)

    def backward(self, microbatch: int, gradient: Gradient = None) -> Gradient:
        """B: use and free what forward kept; return the gradient of the stage's input.

        `gradient` is that of the stage's output; None on the last stage, which starts from its
        loss, and elsewhere where no gradient came back. None also comes out where none goes on.
        """
        flight = self._flight(microbatch, "backward")
        del self._in_flight[microbatch]
        try:
            with self._turn(flight.step):
                gradients = self._given(flight, gradient)
                found = self._revived(flight).full(gradients, lambda: self._weights(flight.step))
        except Exception as error:
            self._note(error, "backward", microbatch)
            raise
        return boundary.gradient_of(flight.input_is_tensor, found)

    def backward_inputs(self, microbatch: int, gradient: Gradient = None) -> Gradient:
        """I: as `backward`, but leave the weights' gradients for `backward_weights`."""
        flight = self._flight(microbatch, "input gradients (I)")
        try:
            with self._turn(flight.step):
                gradients = self._given(flight, gradient)
                flight.kept = self._revived(flight)
                found = flight.kept.inputs(gradients)
        except Exception as error:
            self._note(error, "input gradients (I)", microbatch)
            raise
        flight.inputs_done = True
        return boundary.gradient_of(flight.input_is_tensor, found)

    def backward_weights(self, microbatch: int) -> None:
        """W: add to the weights' `.grad` and free what `backward_inputs` has left."""
        flight = self._in_flight.get(microbatch)
        if flight is None or not flight.inputs_done:
            raise ScheduleError(
                f"stage {self.index}: weight gradients (W) of microbatch {microbatch} before its "
                "input gradients (I); let I come first, and each I have one W"
            )
        del self._in_flight[microbatch]
        try:
            with self._turn(flight.step):
                assert isinstance(flight.kept, Backward)
                flight.kept.weights(self._weights(flight.step))
        except Exception as error:
            self._note(error, "weight gradients (W)", microbatch)
            raise

    def evaluate(self, x: Value, *, microbatch: int = 0, step: int = 0) -> Value:
        """Run the layers on `x` without keeping anything; the last stage returns its output."""
        turn_at = self._randomness
        under = turn_at if self._autocast is None else self._autocast.within(turn_at)
        with torch.no_grad(), under:
            value = boundary.enter(x, [False] * len(tensors(x))).value
            return self._layers.run(self._layers.without_loss, value, Turn(microbatch, step))

    def invalidate_cache(self) -> None:
        """Find out anew what the layers are like: a script may change them between steps."""
        self._layers.invalidate_cache()

    def output_requires_grad(self, microbatch: int) -> tuple[bool, ...]:
        """Return for each tensor of the output of a microbatch in flight: has its gradient a use?

        False for integers, and where all is frozen from the first layer to here.
        """
        return self._in_flight[microbatch].output_requires_grad

    @property
    def in_flight(self) -> int:
        """How many microbatches have gone forward and not yet all the way backward."""
        return len(self._in_flight)

    def clear(self) -> None:
        """Drop what is in flight, after a step that failed; the gradients stay as they are."""
        self._in_flight.clear()
        self._layers.invalidate_cache()

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

    def _run(
        self, value: Value, wanted: Sequence[bool], turn: Turn, split: bool
    ) -> tuple[Backward, Value]:
        """Run the layers, in one graph or in one for each; return what to keep, and the output."""
        # In a graph for the whole stage nobody asks which layers have weights: B is for all.
        groups = self._layers.cut(turn.step).groups if split else [(self._layers.whole, True)]
        graphs: list[Graph] = []
        writes = InPlaceWrites()
        # (Of the layers behind a cut within the stage nothing is asked: they may write.)
        first_writes = self._layers.care(turn.step).writes or self._autocast is not None
        for links, has_weights in groups:
            entered = boundary.enter(value, wanted, first_writes or bool(graphs))
            output = self._layers.run(links, entered.value, turn)
            if graphs:
                writes.look(value, entered, output)
            graphs.append(Graph(entered, output, has_weights))
            value, wanted = output, [tensor.requires_grad for tensor in tensors(output)]
        return Backward(graphs), value

    def _run_and_forget(
        self, value: Value, wanted: Sequence[bool], turn: Turn, split: bool
    ) -> tuple[Recipe, Value]:
        """Run the layers as `_run` does; return what it takes to run them again, and the output."""
        buffers = Buffers(self.layers)
        with forgetting():
            _, output = self._run(copy_of(value), wanted, turn, split=False)
        buffers.keep_changed()
        return Recipe(value, wanted, turn, split, buffers), output

    def _revived(self, flight: InFlight) -> Backward:
        """Return the graphs of a microbatch, which a recipe makes now."""
        kept = flight.kept
        if isinstance(kept, Backward):
            return kept
        then: contextlib.AbstractContextManager[object] = kept.buffers.as_they_were()
        with torch.enable_grad(), then if self._autocast is None else self._autocast.within(then):
            return self._run(kept.value, kept.wanted, kept.turn, kept.split)[0]

    def _weights(self, step: int) -> Sequence[nn.Parameter]:
        """Return the weights to be trained, which only a backward in two parts asks for."""
        return self._layers.cut(step).weights

    def _given(self, flight: InFlight, gradient: Gradient) -> Sequence[Tensor | None]:
        start = flight.start if self.is_last else gradient
        return boundary.gradients_for(len(flight.output_requires_grad), start)

    def _flight(self, microbatch: int, what: str) -> InFlight:
        flight = self._in_flight.get(microbatch)
        if flight is None or flight.inputs_done:
            raise ScheduleError(
                f"stage {self.index}: {what} of microbatch {microbatch}, which is not in flight; "
                "its forward has to come first, and each forward has one backward"
            )
        return flight

    def _turn(self, step: int) -> contextlib.AbstractContextManager[object]:
        """The turn at what is the process's, its random generators, if any layer may draw.

        In a backward too: a layer under torch.utils.checkpoint runs its forward again there, and so
        does a microbatch that is recomputed.
        """
        alone = not self._takes_turns and not self._layers.care(step).draws
        return _NO_TURN if alone else self._randomness

    def _note(self, error: Exception, what: str, microbatch: int) -> None:
        add_note(error, f"in stage {self.index}, {what} of microbatch {microbatch}")


# What a stage keeps of a microbatch between its forward and the end of its backward.


@dataclass(slots=True)
class Recipe:
    """What it takes to run a forward again."""

    value: Value
    wanted: Sequence[bool]
    turn: Turn
    split: bool
    buffers: Buffers


@dataclass(slots=True)
class InFlight:
    """A microbatch between its forward and the end of its backward."""

    kept: Backward | Recipe
    input_is_tensor: bool
    output_requires_grad: tuple[bool, ...]
    start: Tensor | None  # on the last stage: d loss / d loss
    step: int
    inputs_done: bool = False
