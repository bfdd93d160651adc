"""Loss scaling for float16: all ranks scale alike, and skip a step together.

    scaler = barepp.LossScaler(pipe)
    for inputs, targets in batches:
        pipe.zero_grad()
        loss = pipe.step(inputs, targets)     # the loss itself; its backward started from the scale
        scaler.step(optimizer)                # instead of optimizer.step()

Small gradients are 0 in float16, so backward starts from a large number instead of from 1, and the
gradients are divided by it afterwards. Is it too large, some of them are no numbers any more; which
ones, only the rank of their layers sees. So all ranks agree, then all step or none does.

The scale follows the rules of `torch.amp.GradScaler` (PyTorch's manual, "Automatic Mixed Precision
package", "Gradient Scaling"), to the bit: halved after a step that was skipped, doubled after 2000
steps in a row that were not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from barepp.errors import UsageError
from transport.collectives import all_reduce
from transport.private_names import sparse_values

if TYPE_CHECKING:
    from barepp.train.pipeline import Pipeline


class LossScaler:
    """Scales the backward of a pipeline's loss; made by every rank, with the same arguments.

    Without `enabled` it only lets the optimizers step, for scripts that have float16 as an option.

    Attributes:
        scale: what the backward of the next step starts from.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if not (init_scale > 0 and growth_factor > 1 > backoff_factor > 0 and growth_interval > 0):
            raise UsageError(
                f"init_scale {init_scale} and growth_interval {growth_interval} must be above 0, "
                f"growth_factor {growth_factor} above 1, backoff_factor {backoff_factor} between"
            )
        self._pipe = pipe
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._good_steps = 0  # in a row
        self._enabled = enabled
        self.scale = 0.0
        self._set(init_scale if enabled else 1.0)

    def step(self, *optimizers: Optimizer) -> bool:
        """Unscale the gradients, and let the optimizers step if they are numbers on every rank.

        Every rank calls it, also one that has nothing to optimise, with no optimizer. Blocks until
        all ranks have. Returns whether the step was made, the same on every rank.

        Raises:
            UsageError: a gradient is in float16; parameters have to be float32.
        """
        finite = True
        if self._enabled:
            with self._pipe.recorder.span("unscaling"):
                finite = self._agreed(_unscaled(optimizers, self.scale))
        if finite:
            for optimizer in optimizers:
                optimizer.step()
        if self._enabled:
            self._adapt(finite)
        return finite

    def _adapt(self, finite: bool) -> None:
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self._set(self.scale * self._backoff_factor)
        elif self._good_steps == self._growth_interval:
            self._good_steps = 0
            self._set(self.scale * self._growth_factor)

    def state_dict(self) -> dict[str, float]:
        """Return what a training that goes on later has to know."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there; every rank with the same state."""
        self._good_steps = int(state["good_steps"])
        self._set(state["scale"])

    def _agreed(self, finite: bool) -> bool:
        world = self._pipe.world
        if world.world_size == 1:
            return finite
        world.activity = ("agreeing on whether all gradients are finite",)
        bad = all_reduce(
            world.transport, torch.tensor([not finite], dtype=torch.uint8), torch.maximum
        )
        world.activity = ()
        return not bad.item()

    def _set(self, scale: float) -> None:
        # GradScaler keeps it in float32, and does not grow it beyond.
        rounded = torch.tensor(scale, dtype=torch.float32).item()
        if math.isfinite(rounded):
            self.scale = self._pipe.loss_scale = rounded


def _unscaled(optimizers: Iterable[Optimizer], scale: float) -> bool:
    """Divide the gradients of what these optimise; return whether all of them are finite."""
    gradients = [
        _numbers(parameter.grad)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter.grad.numel()
    ]
    if not gradients:
        return True
    inverse = 1.0 / scale if scale else math.inf  # (it was halved until nothing was left)
    for gradient in gradients:
        if gradient.dtype is torch.float16:
            raise UsageError(
                "a gradient is in float16, where what is small was lost before it is unscaled: "
                "keep the parameters in float32 and let autocast convert them"
            )
        gradient.mul_(inverse)
    # The largest of all is NaN if one is: on a GPU a single number comes back to the host.
    largest = get_total_norm(gradients, norm_type=math.inf)
    return math.isfinite(largest.item())


def _numbers(gradient: Tensor) -> Tensor:
    return sparse_values(gradient) if gradient.is_sparse else gradient
