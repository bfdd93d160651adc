"""Cut a batch into microbatches: how many rows each gets, and the tensors themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def split(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Cut `tensor` along its rows into microbatches of these sizes, each in canonical form."""
    if tensor.dim() == 0 or tensor.shape[0] != sum(sizes):
        raise UsageError(
            f"a tensor of shape {tuple(tensor.shape)} cannot be cut into microbatches of "
            f"{list(sizes)} rows: it must have {sum(sizes)} rows"
        )
    # A slice is a view: its first row starts in the middle of the batch's memory, at an odd
    # address when rows have an odd width. Canonical form copies just those.
    return [canonical(rows) for rows in torch.split(tensor, list(sizes))]  # each: [size, ...]
