"""A stage's layers: built and run under their own seeds, and checked as they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from barepp.errors import UsageError
from barepp.train.stage.boundary import Value
from barepp.train.stage.canonical import canonical, canonical_output
from barepp.train.stage.seeding import LayerRandomness
from transport.private_names import call_is_forward

LayerBuilder = Callable[[], nn.Module]
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


class LayerTraits:
    """What has to be done about each layer during one step; for plain layers it is nothing.

    A script may freeze layers or hook them between steps, so each step looks anew.

    Attributes:
        draws: links that may draw random numbers, by number.
        hooked: links whose output's gradient may come back in another than the canonical form.
        forwards: what runs each link about which nothing has to be done.
        writes: whether the first layer may write to its input.
    """

    def __init__(self, step: int, links: Sequence[Link]) -> None:
        self.step = step
        self._links = links
        self.draws: set[int] = set()
        self.hooked: set[int] = set()
        self.forwards: dict[int, Callable[[Any], Any]] = {}
        # The layer behind gives the gradient of an output. Behind the last layer of a stage that is
        # the next stage: backward.py makes what comes from there canonical.
        self.writes = behind_is_plain = True
        for layer, module in reversed(links):
            plain = is_plain(module)
            if not plain:
                self.draws.add(layer)
            if not behind_is_plain:
                self.hooked.add(layer)
            elif plain and module is not None:
                self.forwards[layer] = module.forward
            self.writes, behind_is_plain = not plain, plain

    @cached_property
    def groups(self) -> list[tuple[list[Link], bool]]:
        """The links in groups, each with its own graph when a backward is split.

        A layer with weights to train stands alone (True), others stand with their neighbours.
        """
        groups: list[tuple[list[Link], bool]] = []
        for link in self._links:
            held = () if link.module is None else link.module.parameters()
            trained = any(weight.requires_grad for weight in held)
            if trained or not groups or groups[-1][1]:
                groups.append(([link], trained))
            else:
                groups[-1][0].append(link)
        return groups

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """The parameters of all layers that are to be trained."""
        modules = nn.ModuleList(link.module for link in self._links if link.module is not None)
        return [weight for weight in modules.parameters() if weight.requires_grad]


class Layers:
    """The layers of stage `stage`; the caller of `run` has the turn at the random generators."""

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
        """Forget what was found out about the layers, which may change between steps."""
        self._traits: LayerTraits | None = None

    def traits(self, step: int) -> LayerTraits:
        """Return what has to be done about each layer in this step."""
        if self._traits is None or self._traits.step != step:
            self._traits = LayerTraits(step, self.whole)
        return self._traits

    def run(self, links: Sequence[Link], value: Value, turn: Turn) -> Value:
        """Run layers on `value`, one behind the other."""
        traits = self.traits(turn.step)
        forwards, draws, hooked = traits.forwards, traits.draws, traits.hooked
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
                    value = _checked_output(layer, module(value), layer in hooked)
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


PLAIN: Final = frozenset({nn.Linear, nn.LayerNorm, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU})
"""Layer types that are safe without seeding, copying or gradient hooks; see `is_plain`."""


def is_plain(layer: nn.Module | None) -> bool:
    """Return whether a layer needs no precautions, now: hooks may come and go.

    A pipeline that knows nothing of a layer has to seed the random generator before it, to make
    sure that the gradient which it sends back is canonical (canonical.py), and to hand it a tensor
    that it may write to. For small layers that costs as much as their arithmetic. A layer is plain
    when

    1. its forward draws no random numbers,
    2. its forward does not write to its input,
    3. its backward gives a canonical gradient of its input when it is given a canonical one,
    4. its output is new memory: a layer behind it may write there without touching the input,
    5. and one tensor, which is canonical when the input is.

    The types in `PLAIN` are. A type of your own says so by `plain = True` in its own class body; a
    subclass may do anything, so what is inherited does not count. A layer with hooks, with a
    forward of its own, that is compiled or works in place is not plain. A plain layer's `forward`
    is called directly. The bits are the same either way: test_plain_layers.py checks each type.
    """
    kind = type(layer)
    if layer is None or (kind not in PLAIN and not vars(kind).get("plain", False)):
        return False
    if getattr(layer, "inplace", False) or "forward" in vars(layer):
        return False
    return kind.__call__ is nn.Module.__call__ and call_is_forward(layer)
