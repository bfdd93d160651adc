"""barepp: pipeline-parallel training on raw sockets and processes, bit-identical to one process.

Names are imported at first use (PEP 562), so that `barepp.plan` and `barepp.launch` start without
torch.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barepp import testing
    from barepp.cli import __version__
    from barepp.errors import BareppError, DataError, PartitionError, ScheduleError, UsageError
    from barepp.launch.run import run
    from barepp.plan.balance import balance
    from barepp.plan.layer_costs import LayerCost, stage_costs
    from barepp.program.actions import Action, Kind
    from barepp.schedules import Schedule, make_schedule, schedule_names
    from barepp.trace.collect import write_trace
    from barepp.trace.summary import Summary, summarise
    from barepp.train.layer_profiler import profile
    from barepp.train.loss_scaler import LossScaler
    from barepp.train.models import mlp
    from barepp.train.pipeline import Pipeline
    from barepp.train.stage.stage import Stage
    from barepp.worker.init import init
    from barepp.worker.world import World
    from transport.errors import Failure, JobFailed

# torch warns at its import that NumPy is missing, which neither torch nor barepp needs here. The
# commands, the ranks' processes and the demos import this package before torch.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

_HOMES = {
    "__version__": "barepp.cli",
    "Action": "barepp.program.actions",
    "BareppError": "barepp.errors",
    "DataError": "barepp.errors",
    "Failure": "transport.errors",
    "JobFailed": "transport.errors",
    "Kind": "barepp.program.actions",
    "LayerCost": "barepp.plan.layer_costs",
    "LossScaler": "barepp.train.loss_scaler",
    "PartitionError": "barepp.errors",
    "Pipeline": "barepp.train.pipeline",
    "Schedule": "barepp.schedules",
    "ScheduleError": "barepp.errors",
    "Stage": "barepp.train.stage.stage",
    "UsageError": "barepp.errors",
    "World": "barepp.worker.world",
    "balance": "barepp.plan.balance",
    "init": "barepp.worker.init",
    "make_schedule": "barepp.schedules",
    "mlp": "barepp.train.models",
    "profile": "barepp.train.layer_profiler",
    "run": "barepp.launch.run",
    "schedule_names": "barepp.schedules",
    "Summary": "barepp.trace.summary",
    "stage_costs": "barepp.plan.layer_costs",
    "summarise": "barepp.trace.summary",
    "write_trace": "barepp.trace.collect",
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
    "__version__",
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
