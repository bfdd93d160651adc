"""Which device a rank computes on: what was asked for, what there is, what all ranks agree on.

    --device cpu | cuda | auto      by itself cpu, whose bits are promised; cuda where the transport
                                    moves GPU tensors alone
    auto                            cuda if every rank of the world finds a GPU, else cpu for all
    the n-th rank of a host         has its GPU number n modulo their count: ranks may share one

1. Every rank says how many GPUs it finds when it joins (in its `Address`), and reads what the
   others have said: so all come to the same answer, without a message more.
2. The launcher and the fork server never ask CUDA anything. A process that has asked cannot fork
   one that uses it (CUDA C++ Programming Guide, "Interprocess Communication"; PyTorch's manual,
   "Multiprocessing best practices"). Only names are looked at there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from barepp.errors import UsageError
from transport.registry import NEED_GPU, check_name

if TYPE_CHECKING:
    from transport.cuda.device import Cuda

DEVICES: Final = ("cpu", "cuda", "auto")


def chosen_device(named: str | None, transport: str) -> str:
    """Return "cpu", "cuda" or "auto": what was named, else what the transport is for.

    Raises:
        UsageError: there is no such device, or the transport cannot go with it.
        UnknownTransport: there is no such transport.
    """
    if named is not None and named not in DEVICES:
        raise UsageError(f"there is no device {named!r:.100}; these exist: {', '.join(DEVICES)}")
    if check_name(transport) not in NEED_GPU:
        return named or "cpu"
    if named == "cpu":
        raise UsageError(
            f"transport {transport} moves tensors from GPU to GPU, and device cpu has none there: "
            "leave the device away, or take another transport"
        )
    return "cuda"


def check_forking(device: str) -> None:
    """Refuse to fork ranks that will use CUDA from this process, if it has used that itself."""
    torch = sys.modules.get("torch")
    if device != "cpu" and torch is not None and torch.cuda.is_initialized():
        raise UsageError(
            "CUDA is in use in this process, so ranks that are forked from it cannot use it: move "
            "the function into a module that the ranks can import, or run it before CUDA is used"
        )


# -- in a rank's process --------------------------------------------------------------------------


def num_gpus(device: str, rank: int) -> int:
    """Return how many GPUs this process finds; 0 for "cpu", without asking.

    Raises:
        UsageError: none, and it has to be "cuda"; or there are some, but not for this process.
    """
    if device == "cpu":
        return 0
    import torch

    from transport.private_names import forked_after_cuda

    # In a process that was forked after CUDA was used, CUDA says that there is no GPU. (NVML can
    # still count them.)
    if forked_after_cuda() and (device == "cuda" or torch.cuda.device_count()):
        raise UsageError(
            f"rank {rank} cannot use CUDA: it was forked from a process that has asked CUDA "
            "something, torch.cuda.is_available() say; move the function into a module that the "
            "ranks can import, or run it before CUDA is asked"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not count:
        why = "no driver, or none that CUDA_VISIBLE_DEVICES shows"
        if torch.version.cuda is None:
            why = f"torch {torch.__version__} was built without CUDA"
        raise UsageError(f"device cuda was asked for, but rank {rank} finds no GPU: {why}")
    return count


def on_gpus(device: str, counts: Sequence[int]) -> bool:
    """Return whether the ranks compute on GPUs, all or none; `counts` is what each has found."""
    return device == "cuda" or (device == "auto" and all(counts))


def gpu_of(local_rank: int, count: int) -> Cuda:
    """Return the GPU of a rank."""
    import torch

    from transport.cuda.device import Cuda

    return Cuda(torch.device("cuda", local_rank % count))


def own_gpu(local_rank: int, count: int) -> Cuda:
    """Return the GPU of a rank, and make it the current device of the calling thread."""
    import torch

    gpu = gpu_of(local_rank, count)
    torch.cuda.set_device(gpu.device)
    return gpu
