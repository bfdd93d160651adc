"""transport: tensors between ranks over raw sockets; names are imported at first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transport.base import Transport
    from transport.errors import (
        DeviceError,
        Failure,
        InvalidArgument,
        JobFailed,
        MessageMismatch,
        PeerLeft,
        PeerLost,
        ProtocolError,
        TransportError,
        WaitTimeout,
    )
    from transport.message.specs import MessageSpec, TensorSpec
    from transport.message.work import Work
    from transport.registry import transport_class, transport_names

_HOMES = {
    "DeviceError": "transport.errors",
    "Failure": "transport.errors",
    "InvalidArgument": "transport.errors",
    "JobFailed": "transport.errors",
    "MessageMismatch": "transport.errors",
    "MessageSpec": "transport.message.tensors",
    "PeerLeft": "transport.errors",
    "PeerLost": "transport.errors",
    "ProtocolError": "transport.errors",
    "TensorSpec": "transport.message.tensors",
    "Transport": "transport.base",
    "TransportError": "transport.errors",
    "WaitTimeout": "transport.errors",
    "Work": "transport.message.work",
    "transport_class": "transport.registry",
    "transport_names": "transport.registry",
}

__all__ = [
    "DeviceError",
    "Failure",
    "InvalidArgument",
    "JobFailed",
    "MessageMismatch",
    "MessageSpec",
    "PeerLeft",
    "PeerLost",
    "ProtocolError",
    "TensorSpec",
    "Transport",
    "TransportError",
    "WaitTimeout",
    "Work",
    "transport_class",
    "transport_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
