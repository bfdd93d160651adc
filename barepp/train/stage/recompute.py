"""Recompute (activation checkpointing): keep a stage's input alone, run its forward again later.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. A microbatch in
flight then costs its input instead of all activations, and its backward one forward more.

1. The first forward runs as if it were kept, in grad mode: torch's kernels may differ without. What
   autograd wants to save is dropped on the spot.
2. The second forward starts from the same numbers: the first one had a copy of the input, so that
   a layer that writes in place has left the one that is kept alone; random numbers come from the
   layer's seed (seeding.py); buffers that the first forward changed (BatchNorm's averages) have
   the values of before it.
3. The second forward's changes to buffers are thrown away: each microbatch counts once.

What a layer changes besides its buffers, a plain attribute say, is changed twice: make it a buffer.

On a GPU every buffer counts as changed, and is kept with each microbatch in flight: to compare
would make the host wait for the device. (autograd's count of writes does not tell: BatchNorm's
averages change without it.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from barepp.errors import UsageError
from barepp.train.stage.boundary import Value, like, tensors

RECOMPUTE = ("off", "all", "all_but_last")
"""Which microbatches are recomputed. The last one's backward often follows its forward at once, so
that forgetting its activations in between would save nothing."""


def recompute_of_stages(how: str | Sequence[str], num_stages: int) -> list[str]:
    """Return for each stage which microbatches it recomputes; `how` is for all, or one for each."""
    each = [how] * num_stages if isinstance(how, str) else list(how)
    if len(each) != num_stages:
        raise UsageError(
            f"recompute {each} has {len(each)} entries, but there are {num_stages} stages: give "
            "one for each stage, or one word for all"
        )
    for one in each:
        if one not in RECOMPUTE:
            raise UsageError(f"unknown recompute {one!r}; there is: {', '.join(RECOMPUTE)}")
    return each


def is_recomputed(how: str, microbatch: int, num_microbatches: int) -> bool:
    """Return whether a stage that recomputes like this recomputes this microbatch."""
    return how == "all" or (how == "all_but_last" and microbatch < num_microbatches - 1)


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Build graphs that know their shape (what requires a gradient?) and have saved nothing."""
    with torch.autograd.graph.saved_tensors_hooks(lambda _: None, _never_unpacked):
        yield


def _never_unpacked(_: None) -> Tensor:
    raise AssertionError("a backward through a forward that was to be recomputed")


def copy_of(value: Value) -> Value:
    """Return the same numbers in other memory."""
    return like(value, [tensor.clone() for tensor in tensors(value)])


class Buffers:
    """The buffers of some layers as they were when this was made."""

    def __init__(self, modules: nn.Module) -> None:
        found = [
            (module, name, buffer)
            for module in modules.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        then = {id(buffer): buffer.clone() for _, _, buffer in found}  # shared ones stay shared
        self._saved = [(module, name, buffer, then[id(buffer)]) for module, name, buffer in found]

    def keep_changed(self) -> None:
        """Forget the buffers that have the same values now."""
        self._saved = [
            (module, name, buffer, then)
            for module, name, buffer, then in self._saved
            if getattr(module, name) is not buffer
            or not buffer.is_cpu
            or not torch.equal(buffer, then)
        ]

    @contextlib.contextmanager
    def as_they_were(self) -> Iterator[None]:
        """Put the old values in place for a while; what is written to them is thrown away.

        Other tensors take the buffers' places. Writing to the buffers themselves would make torch
        refuse the backward of a graph that has saved one.
        """
        now = [(module, name, getattr(module, name)) for module, name, _, _ in self._saved]
        for module, name, _, then in self._saved:
            setattr(module, name, then)
        try:
            yield
        finally:
            for module, name, buffer in now:
                setattr(module, name, buffer)
