"""Tells all ranks what one of them knows: how many rows a step has, its loss, where to cut."""

from __future__ import annotations

import torch

from barepp.recorder import Recorder
from barepp.world import World
from transport.collectives import broadcast


def from_rank(
    world: World, recorder: Recorder, tensor: torch.Tensor | None, root: int, what: str
) -> torch.Tensor:
    """Return the root's tensor on every rank; the others wait for `what`, which is recorded."""
    if world.world_size == 1:
        assert tensor is not None
        return tensor
    world.activity = ("sharing" if tensor is not None else "waiting for", what)
    asked = recorder.clock.last()
    shared = broadcast(world.transport, tensor, root)
    ended = recorder.clock.mark()
    world.activity = ()
    if root == world.rank:
        recorder.add_flush(f"sharing {what}", asked, ended)
    else:
        recorder.add_wait(what, root, asked, ended)
    assert isinstance(shared, torch.Tensor)
    return shared
