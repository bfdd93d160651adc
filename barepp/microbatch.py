"""Cut a batch into microbatches: how many rows each gets, and the tensors themselves."""

from collections.abc import Sequence

import torch

from barepp.boundary import Value, like, tensors
from barepp.canonical import canonical
from barepp.errors import UsageError
from barepp.partition import uniform_sizes


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
