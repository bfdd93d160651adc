"""Parameters: the part of a model that one rank holds, and the SHA-256 of the whole model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from barepp.worker.world import World

# Negative tags are ours: a user's tags can never meet them.
_PARAMETER_TAG: Final = -8
_GO_TAG: Final = -9


class ModelPart:
    """Some layers of a model, named by their number in the whole model: "3.weight".

    A `Stage` is one, with its own layers; a `Pipeline` is one, with all layers of its rank.
    """

    layers: nn.ModuleDict

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this rank's parameters, in layer order."""
        return self.layers.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters under their names in the one-process model: "3.weight"."""
        return self.layers.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's parameters and buffers under the one-process model's keys."""
        return self.layers.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load this rank's part of a state; keys of other ranks' layers are passed over."""
        own = self.layers.state_dict().keys()
        self.layers.load_state_dict({key: state[key] for key in own if key in state})

    def zero_grad(self) -> None:
        """Set all gradients of this rank to None."""
        self.layers.zero_grad()

    def train(self, mode: bool = True) -> None:
        """Put this rank's layers into training mode: dropout drops, BatchNorm learns."""
        self.layers.train(mode)

    def eval(self) -> None:
        """Put this rank's layers into evaluation mode."""
        self.layers.eval()


def hash_parameters(
    world: World, holder: Mapping[int, int], stages: Mapping[int, ModelPart]
) -> bytes | None:
    """Return on rank 0 the SHA-256 of all parameters, None elsewhere; every rank calls it.

    `holder` says which rank holds each stage, `stages` are this rank's own. Hashed are the float32
    little-endian bytes of the parameters in layer order. No rank ever holds the whole model: the
    parameters come to rank 0 one by one, and each rank sends when rank 0 asks.
    """
    from transport.message.tensors import memory

    transport, digest = world.transport, hashlib.sha256()
    for index in range(len(holder)):
        src = holder[index]
        own = list(stages[index].parameters()) if world.rank == src else []
        if world.rank == src == 0:
            for parameter in own:
                exported = _exported(parameter)
                digest.update(memory(exported))
        elif world.rank == src:
            transport.recv(0, _GO_TAG)
            transport.send(torch.tensor(len(own)), 0, _PARAMETER_TAG)
            for parameter in own:
                transport.send(_exported(parameter), 0, _PARAMETER_TAG)
        elif world.rank == 0:
            transport.send(torch.empty(0), src, _GO_TAG)
            for _ in range(int(transport.recv(src, _PARAMETER_TAG))):
                exported = transport.recv(src, _PARAMETER_TAG)
                digest.update(memory(exported))
    return digest.digest() if world.rank == 0 else None


def _exported(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32).contiguous()
