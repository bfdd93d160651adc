"""The stages of one rank as the part of the model that it holds: parameters, state, modes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from transport.message.tensors import memory

if TYPE_CHECKING:
    from barepp.worker.world import World
    from transport.base import Transport

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from barepp.train.stage.stage import Stage


class ShardedModel:
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


# Hashes the whole model, which nobody ever holds: its parameters come to rank 0 one by one.

_PARAMETER_TAG = -8  # negative tags are ours: a user's can never meet them
_GO_TAG = -9


def hash_parameters(
    world: World, holder: Mapping[int, int], stages: Mapping[int, Stage]
) -> bytes | None:
    """Return on rank 0 the SHA-256 of all parameters, None elsewhere; every rank calls it.

    `holder` says which rank holds each stage, `stages` are this rank's own. What is hashed are the
    float32 little-endian bytes of the parameters in layer order.
    """
    digest = hashlib.sha256()
    for index in range(len(holder)):
        if world.rank == holder[index] == 0:
            for parameter in stages[index].parameters():
                exported = _exported(parameter)
                digest.update(memory(exported))
        elif world.rank == holder[index]:
            _send(world.transport, stages[index])
        elif world.rank == 0:
            _receive(world.transport, holder[index], digest)
    return digest.digest() if world.rank == 0 else None


def _send(transport: Transport, stage: Stage) -> None:
    parameters = list(stage.parameters())
    transport.recv(0, _GO_TAG)  # rank 0 asks, so that nothing waits in its memory
    transport.send(torch.tensor(len(parameters)), 0, _PARAMETER_TAG)
    for parameter in parameters:
        transport.send(_exported(parameter), 0, _PARAMETER_TAG)


def _receive(transport: Transport, src: int, digest: Any) -> None:
    transport.send(torch.empty(0), src, _GO_TAG)
    for _ in range(int(transport.recv(src, _PARAMETER_TAG))):
        parameter = transport.recv(src, _PARAMETER_TAG)
        assert isinstance(parameter, torch.Tensor)
        digest.update(memory(parameter))


def _exported(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32).contiguous()
