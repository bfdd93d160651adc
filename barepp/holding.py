"""The stages of one rank as the part of the model that it holds: parameters, state, modes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from barepp.stage import Stage


class Holding:
    """What a pipeline and an optimizer see of this rank's `stages`, which come by their number."""

    stages: dict[int, Stage]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this rank's parameters, in layer order."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters under their names in the one-process model: "3.weight"."""
        for stage in self.stages.values():
            yield from stage.named_parameters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return this rank's parameters and buffers under the one-process model's keys."""
        state: dict[str, torch.Tensor] = {}
        for stage in self.stages.values():
            state.update(stage.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load this rank's part of a state; keys of other ranks' layers are passed over."""
        for stage in self.stages.values():
            own = stage.state_dict().keys()
            stage.layers.load_state_dict({key: state[key] for key in own if key in state})

    def zero_grad(self) -> None:
        """Forget all gradients of this rank."""
        for parameter in self.parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> None:
        """Put this rank's layers into training mode (dropout on)."""
        for stage in self.stages.values():
            stage.train(mode)

    def eval(self) -> None:
        """Put this rank's layers into evaluation mode (dropout off)."""
        self.train(False)
