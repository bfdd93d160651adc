"""Transports whose every message travels from GPU to GPU, for suites that speak of CPU tensors.

What a test sends is brought to the GPU first, what arrives is brought back when it is waited for;
in between there are only GPU tensors, and only streams say when they may be used.
"""

from __future__ import annotations

from typing import Any

import torch

from transport.cuda.transport import CudaIpcTransport
from transport.inproc import InprocTransport
from transport.message.specs import Message
from transport.message.tensors import fillable
from transport.shm.transport import ShmTransport
from transport.sockets.transport import TcpTransport


def each(function: Any, message: Any) -> Any:
    """Apply a function to every tensor of a message; leave alone what is none."""
    if isinstance(message, tuple):
        return tuple(each(function, part) for part in message)
    good = isinstance(message, torch.Tensor) and message.device.type != "meta"
    return function(message) if good else message


class Download:
    """A receive on the GPU, whose message is brought to the CPU by whoever waits."""

    def __init__(self, work: Any, gpu: Any, into: Message | None, placed: Message | None) -> None:
        self._work, self._gpu, self.into, self._placed = work, gpu, into, placed

    def wait(self, timeout: float | None = None) -> Message:
        message = self._work.wait(timeout)
        got = each(self._gpu.download, message)
        if self.into is None:
            return got
        assert message is self._placed
        parts = self.into if isinstance(self.into, tuple) else (self.into,)
        for target, part in zip(parts, got if isinstance(got, tuple) else (got,), strict=True):
            with torch.inference_mode():
                target.copy_(part)
        return self.into

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class OnGpu:
    """Mixed into a transport that was given a GPU."""

    gpu: Any

    def isend(self, message: Any, dst: int, tag: int = 0) -> Any:
        return super().isend(each(self.gpu.upload, message), dst, tag)  # type: ignore[misc]

    def irecv(self, src: int, tag: int = 0, *, into: Any = None, expect: Any = None) -> Any:
        if into is not None:  # what cannot be filled on the CPU is refused as ever
            fillable(into)
        placed = each(self.gpu.upload, into)
        work = super().irecv(src, tag, into=placed, expect=expect)  # type: ignore[misc]
        return Download(work, self.gpu, into, placed)

    def withdraw(self, receive: Any) -> bool:
        return bool(super().withdraw(receive._work))  # type: ignore[misc]


class InprocOnGpu(OnGpu, InprocTransport):
    pass


class TcpOnGpu(OnGpu, TcpTransport):
    pass


class ShmOnGpu(OnGpu, ShmTransport):
    pass


class IpcOnGpu(OnGpu, CudaIpcTransport):
    pass


SOCKETS: dict[str, type[TcpTransport]] = {
    "tcp": TcpOnGpu,
    "shm": ShmOnGpu,
    "cuda_ipc": IpcOnGpu,
}
