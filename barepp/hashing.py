"""Hashes the whole model, which nobody ever holds: its parameters come to rank 0 one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from barepp.stage import Stage
from transport.tensors import memory

if TYPE_CHECKING:
    from barepp.world import World
    from transport.contract import Transport

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


def _receive(transport: Transport, src: int, digest: hashlib._Hash) -> None:
    transport.send(torch.empty(0), src, _GO_TAG)
    for _ in range(int(transport.recv(src, _PARAMETER_TAG))):
        parameter = transport.recv(src, _PARAMETER_TAG)
        assert isinstance(parameter, torch.Tensor)
        digest.update(memory(parameter))


def _exported(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32).contiguous()
