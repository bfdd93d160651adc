"""A stage's layers: built and run under their own seeds, and checked as they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from barepp.errors import UsageError
from barepp.train.models import LayerBuilder
from barepp.train.stage.boundary import Value
from barepp.train.stage.canonical import canonical, canonical_output
from barepp.train.stage.seeding import LayerRandomness
from transport.private_names import call_is_forward

LossFunction = Callable[[Any, Any], Tensor]


class Turn(NamedTuple):
    """Which forward this is, and on the last stage what its loss needs."""

    microbatch: int
    step: int
    target: Any = None
    loss_weight: float = 1.0


class Link(NamedTuple):
    """A layer under its number in the whole model; the last one, on the last stage, is the loss."""

    layer: int
    module: nn.Module | None  # None: the loss


class BackwardGroups(NamedTuple):
    """The layers of a stage as a split backward needs them, valid for one step.

    A layer with weights to train stands alone (True), others stand with their neighbours.
    """

    step: int | None
    groups: list[tuple[list[Link], bool]]
    weights: list[nn.Parameter]  # to be trained, of all layers


class LayerTraits(NamedTuple):
    """What has to be done about each link, for plain layers nothing; valid for one step.

    Attributes:
        step: the step.
        draws: links that may draw random numbers, by number.
        hooked: links whose output's gradient may come back in another than the canonical form.
        forwards: what runs each link about which nothing has to be done.
        writes: whether the first layer may write to its input.
    """

    step: int | None
    draws: frozenset[int]
    hooked: frozenset[int]
    forwards: dict[int, Callable[[Any], Any]]
    writes: bool


_NOT_LOOKED_AT: Final = LayerTraits(None, frozenset(), frozenset(), {}, True)


class Layers:
    """The layers of stage `stage`; whoever runs them has the turn at the random generators."""

    def __init__(
        self,
        stage: int,
        layer_range: range,
        builders: Sequence[LayerBuilder],
        loss_fn: LossFunction | None,
        *,
        randomness: LayerRandomness,
        device: torch.device | None,
    ) -> None:
        self._stage = stage
        self._loss_fn = loss_fn
        self._randomness = randomness
        # The names are the layers' numbers in the whole model, so that a state_dict has the same
        # keys (`5.weight`) wherever the model is cut.
        self.modules = nn.ModuleDict(
            {str(layer): self._build(layer, builders[layer]) for layer in layer_range}
        )
        if device is not None:
            self.modules.to(device)  # built on the CPU: the same initial weights on each device
        modules = self.modules.values()
        self.without_loss = [Link(*pair) for pair in zip(layer_range, modules, strict=True)]
        loss = [] if loss_fn is None else [Link(layer_range.stop, None)]
        self.whole = [*self.without_loss, *loss]
        self.invalidate_cache()

    def invalidate_cache(self) -> None:
        """Forget what was found out about the layers; whoever holds the stage may change them."""
        self._cut = BackwardGroups(None, [], [])
        self._care = _NOT_LOOKED_AT

    def cut(self, step: int) -> BackwardGroups:
        """Return the links in groups, each with its own graph when a backward is split.

        Found anew in each step: a script may freeze and thaw layers between steps.
        """
        if self._cut.step != step:
            groups: list[tuple[list[Link], bool]] = []
            for link in self.whole:
                held = () if link.module is None else link.module.parameters()
                trained = any(weight.requires_grad for weight in held)
                if trained or not groups or groups[-1][1]:
                    groups.append(([link], trained))
                else:
                    groups[-1][0].append(link)
            weights = [weight for weight in self.modules.parameters() if weight.requires_grad]
            self._cut = BackwardGroups(step, groups, weights)
        return self._cut

    def care(self, step: int) -> LayerTraits:
        """Return what has to be done about each layer; found anew in each step."""
        if self._care.step != step:
            draws, hooked, forwards = set(), set(), {}
            # Whoever comes next gives the gradient of an output. Behind the last layer of a stage
            # that is the next stage: backward.py makes what comes from there canonical.
            writes = behind_is_fine = True
            for layer, module in reversed(self.whole):
                fine = is_plain(module)
                if not fine:
                    draws.add(layer)
                if not behind_is_fine:
                    hooked.add(layer)
                elif fine and module is not None:
                    forwards[layer] = module.forward
                writes, behind_is_fine = not fine, fine
            self._care = LayerTraits(step, frozenset(draws), frozenset(hooked), forwards, writes)
        return self._care

    def run(self, links: Sequence[Link], value: Value, turn: Turn) -> Value:
        """Run layers on `value`, one behind the other."""
        care = self.care(turn.step)
        forwards, draws = care.forwards, care.draws
        for layer, module in links:
            # A loss may draw random numbers too; it counts as the layer behind the last one.
            if layer in draws:
                self._randomness.seed_layer(layer, turn.step, turn.microbatch)
            try:
                if layer in forwards:
                    value = forwards[layer](value)
                elif module is None:
                    value = self._loss(value, turn)
                else:
                    value = _checked_output(layer, module(value), layer in care.hooked)
            except Exception as error:
                add_note(error, self._where(layer, module, turn))
                raise
        return value

    def _where(self, layer: int, module: nn.Module | None, turn: Turn) -> str:
        if module is None:
            return f"in the loss of microbatch {turn.microbatch}, on stage {self._stage}"
        name = f"layer {layer} ({_type_name(module)}) of stage {self._stage}"
        return f"in {name}, forward of microbatch {turn.microbatch}"

    def _build(self, layer: int, builder: LayerBuilder) -> nn.Module:
        try:
            with self._randomness:
                self._randomness.seed_initial(layer)
                module = builder()
        except Exception as error:
            add_note(error, f"while building layer {layer} of stage {self._stage}")
            raise
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"the builder of layer {layer} returned {_type_name(module)}, not an nn.Module; "
                "give callables that build a layer, e.g. functools.partial(nn.Linear, 64, 128)"
            )
        return module

    def _loss(self, output: Value, turn: Turn) -> Tensor:
        assert self._loss_fn is not None
        loss = self._loss_fn(output, turn.target)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            what = list(loss.shape) if isinstance(loss, Tensor) else _type_name(loss)
            raise UsageError(
                f"loss_fn returned {what}, not a 0-dimensional tensor; it must be a mean over rows"
            )
        return loss * turn.loss_weight  # []


def _checked_output(layer: int, output: Any, hooked: bool) -> Value:
    made_canonical = canonical_output if hooked else canonical
    if isinstance(output, Tensor):
        return made_canonical(output)  # [rows, ...]
    keyed = isinstance(output, dict) and all(isinstance(key, str) for key in output)
    parts = output.values() if keyed else output if isinstance(output, tuple) else (None,)
    if not all(isinstance(part, Tensor) for part in parts):
        raise UsageError(
            f"layer {layer} returned {_type_name(output)}; from layer to layer goes a tensor, or a "
            "tuple of tensors, or a dict of tensors whose keys are strings"
        )
    seen: set[int] = set()
    apart = []
    for part in parts:
        # The same tensor twice is two tensors for another stage: two gradients, added at the end.
        apart.append(made_canonical(part.clone() if id(part) in seen else part))
        seen.add(id(part))
    return dict(zip(output, apart, strict=True)) if keyed else tuple(apart)


def add_note(error: Exception, note: str) -> None:
    """Add a line to what is shown of an error, where Python can (from 3.11 on)."""
    if hasattr(error, "add_note"):
        error.add_note(note)


def _type_name(thing: object) -> str:
    return type(thing).__name__


# Layers of which the type alone says that three precautions are needless.
#
# A pipeline that knows nothing of a layer has to seed the random generator before it, to make sure
# that the gradient which it sends back is canonical (canonical.py), and to hand it a tensor that it
# may write to. For small layers that costs as much as their arithmetic. A layer is plain when
#
# 1. its forward draws no random numbers,
# 2. its forward does not write to its input,
# 3. its backward gives a canonical gradient of its input when it is given a canonical one,
# 4. its output is new memory: a layer behind it may write there without touching the input,
# 5. and one tensor, which is canonical when the input is.
#
# The types below are, and their `forward` is called straight away, without the way that torch goes
# through hooks. A type of your own says so by `plain = True` in its own class body; what is
# inherited does not count, for a subclass may do anything. A layer with hooks, with a forward of
# its own, that is compiled or works in place is not plain. Results are the same either way, bit for
# bit: tests/train/stage/test_plain_layers.py holds each type to its word.

PLAIN: Final = frozenset({nn.Linear, nn.LayerNorm, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU})


def is_plain(layer: nn.Module | None) -> bool:
    """Return whether a layer is plain, now: hooks may come and go."""
    kind = type(layer)
    if layer is None or (kind not in PLAIN and not vars(kind).get("plain", False)):
        return False
    if getattr(layer, "inplace", False) or "forward" in vars(layer):
        return False
    return kind.__call__ is nn.Module.__call__ and call_is_forward(layer)
