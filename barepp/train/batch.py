"""Cuts a batch into microbatches, on the ranks and devices that need it.

    10 rows, 4 microbatches:   rows 0–2 │ 3–5 │ 6–7 │ 8–9     weights .3 .3 .2 .2

1. Microbatches are as even as possible, larger first; none is empty.
2. A microbatch's weight is its share of the rows: the weighted losses add up to the batch's mean.
3. Each microbatch is canonical (canonical.py): a slice of the batch may not be aligned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from barepp.errors import UsageError
from barepp.plan.partition import uniform_sizes
from barepp.train.stage.boundary import Value, like, tensors
from barepp.train.stage.canonical import canonical


def microbatch_sizes(num_rows: int, num_microbatches: int) -> list[int]:
    """Return the rows of each microbatch: as even as possible, larger first, none ever empty.

    A batch with fewer rows than microbatches becomes as many microbatches as it has rows.
    """
    if num_microbatches < 1:
        raise UsageError(f"num_microbatches is {num_microbatches}; it must be at least 1")
    if num_rows < 1:
        raise UsageError(f"a batch of {num_rows} rows cannot be trained on; give at least 1 row")
    return uniform_sizes(num_rows, min(num_rows, num_microbatches))


def num_rows(value: Value) -> int:
    """Return the rows of a batch, 0 if it has none: of a tuple or dict, those of its tensors."""
    parts = tensors(value)
    counts = {len(tensor) if tensor.dim() else 0 for tensor in parts}
    if len(counts) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in parts)
        raise UsageError(f"the tensors of a batch need the same number of rows: {shapes}")
    return counts.pop() if counts else 0


def split(batch: Value, sizes: Sequence[int]) -> list[Value]:
    """Cut a batch along its rows into microbatches of these sizes, each in canonical form."""
    if num_rows(batch) != sum(sizes):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors(batch))
        raise UsageError(
            f"a batch of shape {shapes} cannot be cut into microbatches of "
            f"{list(sizes)} rows: it must have {sum(sizes)} rows"
        )
    # A slice is a view: its first row starts in the middle of the batch's memory, at an odd
    # address when rows have an odd width. Canonical form copies just those.
    columns = [torch.split(tensor, list(sizes)) for tensor in tensors(batch)]
    return [
        like(batch, [canonical(rows) for rows in microbatch])  # each: [size, ...]
        for microbatch in zip(*columns, strict=True)
    ]


def join(parts: Sequence[Value]) -> Value:
    """Undo `split`."""
    columns = zip(*(tensors(part) for part in parts), strict=True)
    return like(parts[0], [torch.cat(column) for column in columns])


@dataclasses.dataclass
class Batch:
    """One step's microbatches; each part only on the rank that needs it."""

    step: int
    weights: Sequence[float]  # rows of the microbatch / rows of the batch
    inputs: Sequence[Value] | None  # on the rank of the first stage
    targets: Sequence[Value] | None  # on the rank of the last stage
    loss_scale: float = 1.0  # what backward starts from, there
    copied: Sequence[torch.cuda.Event] = ()  # after the copies from page-locked memory

    def let_go(self) -> None:
        """Block until the caller may write to its tensors again; they were copied long ago."""
        for event in self.copied:
            event.synchronize()


def moved(value: Value, device: torch.device, copied: list[torch.cuda.Event]) -> Value:
    """Return a value on the rank's device; `copied` gets an event if a copy is still going on.

    A copy from page-locked memory goes on after the call. From other memory, CUDA has taken its own
    copy when the call returns (CUDA Runtime API, "API synchronization behavior").
    """
    given = tensors(value)
    if all(tensor.device == device for tensor in given):
        return value
    there = like(value, [tensor.to(device, non_blocking=True) for tensor in given])
    if device.type == "cuda" and any(tensor.is_pinned() for tensor in given):
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        copied.append(event)
    return there


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
