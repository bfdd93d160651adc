"""transport: tensors between ranks over raw sockets; names are imported at first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {  # where each public name is
    "transport.base": ["Transport"],
    "transport.errors": [
        "DeviceError",
        "Failure",
        "InvalidArgument",
        "JobFailed",
        "MessageMismatch",
        "PeerLeft",
        "PeerLost",
        "ProtocolError",
        "TransportError",
        "WaitTimeout",
    ],
    "transport.message.specs": ["MessageSpec", "TensorSpec"],
    "transport.message.work": ["Work"],
    "transport.registry": ["transport_class", "transport_names"],
    "transport.wire.records": ["RecordStream"],
}

if TYPE_CHECKING:  # for type checkers, which need to see the imports
    from transport.base import Transport as Transport
    from transport.errors import DeviceError as DeviceError
    from transport.errors import Failure as Failure
    from transport.errors import InvalidArgument as InvalidArgument
    from transport.errors import JobFailed as JobFailed
    from transport.errors import MessageMismatch as MessageMismatch
    from transport.errors import PeerLeft as PeerLeft
    from transport.errors import PeerLost as PeerLost
    from transport.errors import ProtocolError as ProtocolError
    from transport.errors import TransportError as TransportError
    from transport.errors import WaitTimeout as WaitTimeout
    from transport.message.specs import MessageSpec as MessageSpec
    from transport.message.specs import TensorSpec as TensorSpec
    from transport.message.work import Work as Work
    from transport.registry import transport_class as transport_class
    from transport.registry import transport_names as transport_names
    from transport.wire.records import RecordStream as RecordStream
else:
    __all__ = sorted(name for names in _NAMES.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    for home, names in _NAMES.items():
        if name in names:
            module = importlib.import_module(home)
            value = globals()[name] = getattr(module, name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
