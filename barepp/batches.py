"""What a step works on: the batch, cut into microbatches, on the ranks and devices that need it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from barepp.boundary import Value, like, tensors
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
    copied: Sequence[torch.cuda.Event] = ()  # after the copies from page-locked memory

    def let_go(self) -> None:
        """Block until the caller may write to its tensors again: that was some time ago."""
        for event in self.copied:
            event.synchronize()


def moved(value: Value, device: torch.device, copied: list[torch.cuda.Event]) -> Value:
    """Return a value on the device of the rank, and note in `copied` what still reads the old one.

    A copy from page-locked memory goes on beside this process. Of other memory CUDA has taken its
    own copy when the call returns (CUDA Runtime API, "API synchronization behavior").
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
