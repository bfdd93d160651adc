"""barepp: pipeline-parallel training on raw sockets and processes, bit-identical to one process.

Names are imported at first use (PEP 562), so that `barepp.plan` and `barepp.launch` start without
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barepp import testing
    from barepp.actions import Action, Kind
    from barepp.errors import BareppError, DataError, PartitionError, ScheduleError, UsageError
    from barepp.joining import init
    from barepp.models import mlp
    from barepp.pipeline import Pipeline
    from barepp.run import run
    from barepp.schedules import Schedule, make_schedule, schedule_names
    from barepp.stage import Stage
    from barepp.trace import summarise, write_trace
    from barepp.world import World
    from transport.errors import Failure, JobFailed

_HOMES = {
    "Action": "barepp.actions",
    "BareppError": "barepp.errors",
    "DataError": "barepp.errors",
    "Failure": "transport.errors",
    "JobFailed": "transport.errors",
    "Kind": "barepp.actions",
    "PartitionError": "barepp.errors",
    "Pipeline": "barepp.pipeline",
    "Schedule": "barepp.schedules",
    "ScheduleError": "barepp.errors",
    "Stage": "barepp.stage",
    "UsageError": "barepp.errors",
    "World": "barepp.world",
    "init": "barepp.joining",
    "make_schedule": "barepp.schedules",
    "mlp": "barepp.models",
    "run": "barepp.run",
    "schedule_names": "barepp.schedules",
    "summarise": "barepp.trace",
    "write_trace": "barepp.trace",
}

__all__ = [
    "Action",
    "BareppError",
    "DataError",
    "Failure",
    "JobFailed",
    "Kind",
    "PartitionError",
    "Pipeline",
    "Schedule",
    "ScheduleError",
    "Stage",
    "UsageError",
    "World",
    "init",
    "make_schedule",
    "mlp",
    "run",
    "schedule_names",
    "summarise",
    "testing",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("barepp.testing")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
