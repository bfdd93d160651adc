"""transport: tensors between ranks over raw sockets; names are imported at first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transport.contract import Transport
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
    from transport.registry import transport_class, transport_names
    from transport.tensors import MessageSpec, TensorSpec
    from transport.work import Work

_HOMES = {
    "DeviceError": "transport.errors",
    "Failure": "transport.errors",
    "InvalidArgument": "transport.errors",
    "JobFailed": "transport.errors",
    "MessageMismatch": "transport.errors",
    "MessageSpec": "transport.tensors",
    "PeerLeft": "transport.errors",
    "PeerLost": "transport.errors",
    "ProtocolError": "transport.errors",
    "TensorSpec": "transport.tensors",
    "Transport": "transport.contract",
    "TransportError": "transport.errors",
    "WaitTimeout": "transport.errors",
    "Work": "transport.work",
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
