"""What a transport needs of a GPU (`Gpu`), and the GPU that CUDA gives (`Cuda`).

A transport without a `Gpu` moves CPU tensors alone and never comes here. Tests put a fake in its
place: memory and events that are shared between processes, and streams whose copies come late.

`Cuda` has not yet run on hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import torch

from transport.errors import UnknownTransport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transport.addresses import Address

CPU: Final = torch.device("cpu")


class Gpu(Protocol):
    """One rank's GPU, as its transport sees it."""

    device: torch.device

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is this GPU's."""


class Cuda:
    """A GPU over CUDA. To make one initialises CUDA: never in a process that forks ranks later."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is this GPU's."""
        return tensor.device == self.device


def local_gpu(rank: int, addresses: Mapping[int, Address], num_gpus: int) -> int:
    """Return which GPU of its host a rank uses: the n-th of a host's ranks has the n-th.

    Raises:
        UnknownTransport: the host has more ranks than GPUs, which NCCL does not allow.
    """
    host = addresses[rank].host
    neighbours = sorted(other for other, address in addresses.items() if address.host == host)
    if len(neighbours) > num_gpus:
        raise UnknownTransport(
            f"nccl needs one GPU a rank: this host has {len(neighbours)} ranks and {num_gpus} GPUs"
        )
    return neighbours.index(rank)
