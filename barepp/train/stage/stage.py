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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from barepp.errors import ScheduleError
from barepp.train.parameters import ModelPart
from barepp.train.stage import boundary
from barepp.train.stage.backward import Backward, Graph, InPlaceWrites
from barepp.train.stage.boundary import Gradient, Value, tensors
from barepp.train.stage.layers import LayerBuilder, Layers, LossFunction, Turn, add_note
from barepp.train.stage.recompute import Buffers, copy_of, forgetting
from barepp.train.stage.seeding import PLAIN_CPU, Compute, Context

Again = Callable[[], Backward]
Made = TypeVar("Made")

_NO_TURN: Final = contextlib.nullcontext()


class Stage(ModelPart):
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
        compute: Compute = PLAIN_CPU,
    ) -> None:
        self.index = index
        self.layer_range = layer_range
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self.peak_in_flight = 0
        self._compute = compute
        self._randomness = compute.randomness(seed)
        self._in_flight: dict[int, InFlight] = {}
        loss = loss_fn if self.is_last else None
        self._layers = Layers(
            index, layer_range, builders, loss, randomness=self._randomness, device=compute.device
        )
        self.layers = self._layers.modules

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
        with self._compute.within(self._turn(step)):
            kept, output = run(x, wanted, turn, split)
        needed = tuple([tensor.requires_grad for tensor in tensors(output)])
        start = None
        if self.is_last:
            # By way of float32: what is too large for float16 becomes inf, which a scaler finds.
            loss = tensors(output)[0]
            start = torch.full_like(loss, loss_scale, dtype=torch.float32).to(loss.dtype)  # []
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

        def work() -> Sequence[Tensor | None]:
            gradients = self._gradients(flight, gradient)
            return self._graphs(flight).full(gradients, lambda: self._weights(flight))

        found = self._in_turn(flight, "backward", microbatch, work)
        return boundary.gradient_of(flight.input_is_tensor, found)

    def backward_inputs(self, microbatch: int, gradient: Gradient = None) -> Gradient:
        """I: as `backward`, but leave the weights' gradients for `backward_weights`."""
        flight = self._flight(microbatch, "input gradients (I)")

        def work() -> Sequence[Tensor | None]:
            flight.kept = self._graphs(flight)
            return flight.kept.inputs(self._gradients(flight, gradient))

        found = self._in_turn(flight, "input gradients (I)", microbatch, work)
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

        def work() -> None:
            self._graphs(flight).weights(self._weights(flight))

        self._in_turn(flight, "weight gradients (W)", microbatch, work)

    def evaluate(self, x: Value, *, microbatch: int = 0, step: int = 0) -> Value:
        """Run the layers on `x` without keeping anything; the last stage returns its output."""
        with torch.no_grad(), self._compute.within(self._randomness):
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

    def _run(
        self, value: Value, wanted: Sequence[bool], turn: Turn, split: bool
    ) -> tuple[Backward, Value]:
        """Run the layers, in one graph or in one for each; return what to keep, and the output."""
        traits = self._layers.traits(turn.step)
        # One graph for the whole stage need not know which layers have weights: B is for all.
        groups = traits.groups if split else [(self._layers.whole, True)]
        graphs: list[Graph] = []
        writes = InPlaceWrites()
        # (The layers behind a cut within the stage are not asked: any of them may write.)
        first_writes = traits.writes or self._compute.autocast is not None
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
    ) -> tuple[Again, Value]:
        """Run the layers as `_run` does; return what runs them again, and the output."""
        buffers = Buffers(self.layers)
        with forgetting():
            _, output = self._run(copy_of(value), wanted, turn, split=False)
        buffers.keep_changed()

        def again() -> Backward:
            with torch.enable_grad(), self._compute.within(buffers.as_they_were()):
                return self._run(value, wanted, turn, split)[0]

        return again, output

    def _graphs(self, flight: InFlight) -> Backward:
        """Return the graphs of a microbatch; where none were kept, they are made now."""
        return flight.kept if isinstance(flight.kept, Backward) else flight.kept()

    def _weights(self, flight: InFlight) -> Sequence[Tensor]:
        """Return the weights to be trained, which only a backward in two parts asks for."""
        return self._layers.traits(flight.step).weights

    def _gradients(self, flight: InFlight, gradient: Gradient) -> Sequence[Tensor | None]:
        """Return the gradient that each tensor of the output starts from."""
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

    def _turn(self, step: int) -> Context:
        """The turn at what is the process's, its random generators, if any layer may draw.

        In a backward too: a layer under torch.utils.checkpoint runs its forward again there, and so
        does a microbatch that is recomputed. Threads under autocast always take turns (autocast.py,
        rule 3).
        """
        by_turns = self._compute.autocast is not None and self._compute.lock is not None
        return self._randomness if by_turns or self._layers.traits(step).draws else _NO_TURN

    def _in_turn(
        self, flight: InFlight, what: str, microbatch: int, work: Callable[[], Made]
    ) -> Made:
        """Do a part of a backward in this stage's turn, and add to an error where it happened."""
        try:
            with self._turn(flight.step):
                return work()
        except Exception as error:
            add_note(error, f"in stage {self.index}, {what} of microbatch {microbatch}")
            raise


@dataclass(slots=True)
class InFlight:
    """A microbatch between its forward and the end of its backward."""

    kept: Backward | Again
    input_is_tensor: bool
    output_requires_grad: tuple[bool, ...]
    start: Tensor | None  # on the last stage: d loss / d loss
    step: int
    inputs_done: bool = False
