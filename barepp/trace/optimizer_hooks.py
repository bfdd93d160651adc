"""Records the steps of torch's optimizers, without a word in the script that calls them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from barepp.trace.recorder import Recorder


def watch_optimizers(recorder: Recorder, parameters: Iterable[torch.Tensor]) -> None:
    """Let `recorder` keep a span of every optimizer step on any of `parameters`, while it traces.

    The hooks are torch's own and for all optimizers of the process, whenever they are made. They
    look and touch nothing, and go with the recorder.
    """
    mine = frozenset(map(id, parameters))  # (a set of tensors would compare their elements)
    keeper = weakref.ref(recorder)  # what hangs in torch must not keep it alive
    started: dict[int, int] = {}

    def is_mine(optimizer: Optimizer) -> bool:
        return any(id(one) in mine for group in optimizer.param_groups for one in group["params"])

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        to = keeper()
        # Of ranks that are threads each sees all optimizers; its clock is its own thread's alone.
        if to is not None and to.tracing and is_mine(optimizer):
            started[id(optimizer)] = to.clock.mark()

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        start, to = started.pop(id(optimizer), None), keeper()
        if start is not None and to is not None and to.tracing:
            to.add_outside(f"optimizer ({type(optimizer).__name__})", start, to.clock.mark())

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    for handle in handles:
        weakref.finalize(recorder, handle.remove).atexit = False
