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
    from barepp.balancing import balance
    from barepp.errors import BareppError, DataError, PartitionError, ScheduleError, UsageError
    from barepp.joining import init
    from barepp.layer_costs import LayerCost, stage_costs
    from barepp.models import mlp
    from barepp.pipeline import Pipeline
    from barepp.profiling import profile
    from barepp.run import run
    from barepp.scaler import LossScaler
    from barepp.schedules import Schedule, make_schedule, schedule_names
    from barepp.stage import Stage
    from barepp.summary import Summary, summarise
    from barepp.trace import write_trace
    from barepp.world import World
    from transport.errors import Failure, JobFailed

__version__ = "0.1.0"  # (pyproject.toml says the same: a test compares them)

_HOMES = {
    "Action": "barepp.actions",
    "BareppError": "barepp.errors",
    "DataError": "barepp.errors",
    "Failure": "transport.errors",
    "JobFailed": "transport.errors",
    "Kind": "barepp.actions",
    "LayerCost": "barepp.layer_costs",
    "LossScaler": "barepp.scaler",
    "PartitionError": "barepp.errors",
    "Pipeline": "barepp.pipeline",
    "Schedule": "barepp.schedules",
    "ScheduleError": "barepp.errors",
    "Stage": "barepp.stage",
    "UsageError": "barepp.errors",
    "World": "barepp.world",
    "balance": "barepp.balancing",
    "init": "barepp.joining",
    "make_schedule": "barepp.schedules",
    "mlp": "barepp.models",
    "profile": "barepp.profiling",
    "run": "barepp.run",
    "schedule_names": "barepp.schedules",
    "Summary": "barepp.summary",
    "stage_costs": "barepp.layer_costs",
    "summarise": "barepp.summary",
    "write_trace": "barepp.trace",
}

__all__ = [
    "Action",
    "BareppError",
    "DataError",
    "Failure",
    "JobFailed",
    "Kind",
    "LayerCost",
    "LossScaler",
    "PartitionError",
    "Pipeline",
    "Schedule",
    "ScheduleError",
    "Stage",
    "Summary",
    "UsageError",
    "World",
    "balance",
    "init",
    "make_schedule",
    "mlp",
    "profile",
    "run",
    "schedule_names",
    "stage_costs",
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
