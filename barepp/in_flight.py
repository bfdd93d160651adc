"""What a stage keeps of a microbatch between its forward and the end of its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from barepp.backward import Backward
from barepp.boundary import Value
from barepp.layers import Turn
from barepp.recompute import Buffers


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
