"""Transports by name; a wrong name is answered with the names that exist.

Nothing is imported before it is asked for, so that the launcher can check a name without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from transport.errors import UnknownTransport

if TYPE_CHECKING:
    from transport.base import Transport

_CLASSES: Final = {
    "cuda_ipc": "transport.cuda.transport:CudaIpcTransport",
    "gloo": "transport.torch_dist.transport:GlooTransport",
    "inproc": "transport.inproc:InprocTransport",
    "nccl": "transport.torch_dist.transport:NcclTransport",
    "shm": "transport.shm.transport:ShmTransport",
    "tcp": "transport.sockets.transport:TcpTransport",
    "unix": "transport.sockets.transport:UnixTransport",
}
AUTO: Final = ("shm", "unix", "tcp")  # what "auto" tries, the fastest first
AUTO_ON_GPU: Final = ("cuda_ipc", *AUTO)  # likewise, when tensors are on a GPU
NEED_GPU: Final = frozenset({"cuda_ipc", "nccl"})  # what is of no use without one


def transport_names() -> list[str]:
    """Return every name that `--transport` takes."""
    return ["auto", *_CLASSES]


def check_name(name: str) -> str:
    """Return `name` if it is a transport's.

    Raises:
        UnknownTransport: it is not; the message lists what exists.
    """
    if name not in transport_names():
        raise UnknownTransport(
            f"there is no transport {name!r}; these exist: {', '.join(transport_names())}"
        )
    return name


def named_class(name: str) -> type[Transport]:
    """Return the class of a transport, whether or not this machine can use it."""
    module, _, attribute = _CLASSES[name].partition(":")
    found: type[Transport] = getattr(importlib.import_module(module), attribute)
    return found


def transport_class(name: str, *, gpu: bool = False) -> type[Transport]:
    """Return the class for a name; "auto" gives the fastest one that this machine can use.

    `gpu` says that tensors on a GPU are to be moved, for which another one is the fastest. Asking
    for a transport of `NEED_GPU` may initialise CUDA, so a process that forks ranks must not.

    Raises:
        UnknownTransport: no such name, or one that this machine cannot use, with the reason.
    """
    reasons = []
    auto = AUTO_ON_GPU if gpu else AUTO
    for candidate in auto if check_name(name) == "auto" else (name,):
        found = named_class(candidate)
        reason = found.viable()
        if reason is None:
            return found
        reasons.append(f"{candidate}: {reason}")
    raise UnknownTransport(f"transport {name!r} cannot be used here: {'; '.join(reasons)}")
