"""The GPU of this machine, with what the suites ask of the fake one; for tests only.

Not yet run on hardware. On a machine without a GPU nothing here is used, and what would be is
skipped (test_gpu.py says so).
"""

from __future__ import annotations

import pytest
import torch

from transport.cuda.device import Cuda
from transport.device import CPU

THERE = torch.cuda.device_count() > 0  # (by NVML: CUDA is not initialised)
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not THERE, reason="this machine has no CUDA device that torch can use"),
]


class RealGpu(Cuda):
    """One of this machine's GPUs, which several ranks share if there are more of them."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__(torch.device("cuda", rank % torch.cuda.device_count()))

    def close(self) -> None:
        """Wait until nothing runs any more."""
        torch.cuda.synchronize(self.device)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like, device=self.device)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the GPU, behind work that takes a while there."""
        with torch.cuda.device(self.device):
            torch.cuda._sleep(1_000_000)  # cycles: about a millisecond
        return tensor.detach().clone().to(self.device)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what the tensor is on the calling thread's current stream."""
        return tensor.to(CPU)

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        with torch.cuda.device(self.device):
            torch.cuda._sleep(1_000_000)
        tensor.fill_(value)
