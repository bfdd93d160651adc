"""What a step works on: the batch, cut into microbatches, on the ranks that need it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from barepp.boundary import Value
from barepp.errors import UsageError
from barepp.microbatch import num_rows


@dataclasses.dataclass
class Batch:
    """One step's microbatches; each part only on the rank that needs it."""

    step: int
    weights: Sequence[float]  # rows of the microbatch / rows of the batch
    inputs: Sequence[Value] | None  # on the rank of the first stage
    targets: Sequence[Value] | None  # on the rank of the last stage
    loss_scale: float = 1.0  # what backward starts from, there


def rows_of_inputs(inputs: Value | None) -> int:
    """Return how many rows a step has; asked on the rank of the first stage."""
    given = 0 if inputs is None else num_rows(inputs)
    if not given:
        raise UsageError("the rank of the first stage needs inputs with at least one row")
    return given


def check_targets(targets: Value | None, rows: int) -> None:
    """Refuse targets that do not belong to that many rows; asked on the rank of the last stage."""
    if targets is None or num_rows(targets) != rows:
        found = "no targets" if targets is None else f"{num_rows(targets)} targets"
        raise UsageError(f"the batch has {rows} inputs, but the last stage got {found}")
