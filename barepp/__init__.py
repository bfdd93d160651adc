"""barepp: pipeline-parallel training on raw sockets and processes, bit-identical to one process.

Names are imported at first use (PEP 562), so that `barepp.plan` and `barepp.launch` start without
torch.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

# torch warns at its import that NumPy is missing, which neither torch nor barepp needs here. The
# commands, the ranks' processes and the demos import this package before torch.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

_NAMES = {  # where each public name is
    "barepp.cli": ["__version__"],
    "barepp.errors": ["BareppError", "DataError", "PartitionError", "ScheduleError", "UsageError"],
    "barepp.launch.run": ["run"],
    "barepp.plan.balance": ["balance"],
    "barepp.plan.layer_costs": ["LayerCost", "stage_costs"],
    "barepp.plan.simulate": ["Costs", "simulate"],
    "barepp.program.actions": ["Action", "Kind"],
    "barepp.schedules": ["Schedule", "make_schedule", "schedule_names"],
    "barepp.testing": ["testing"],
    "barepp.trace.collect": ["write_trace"],
    "barepp.trace.recorder": ["Recorder"],
    "barepp.trace.summary": ["Summary", "summarise"],
    "barepp.train.layer_profiler": ["profile"],
    "barepp.train.loss_scaler": ["LossScaler"],
    "barepp.train.models": ["mlp"],
    "barepp.train.pipeline": ["Pipeline"],
    "barepp.train.stage.seeding": ["derive_seed"],
    "barepp.train.stage.stage": ["Stage"],
    "barepp.worker.init": ["init", "launched"],
    "barepp.worker.world": ["World"],
    "transport.errors": ["Failure", "JobFailed"],
}

if TYPE_CHECKING:  # for type checkers, which need to see the imports
    from barepp import testing as testing
    from barepp.cli import __version__ as __version__
    from barepp.errors import BareppError as BareppError
    from barepp.errors import DataError as DataError
    from barepp.errors import PartitionError as PartitionError
    from barepp.errors import ScheduleError as ScheduleError
    from barepp.errors import UsageError as UsageError
    from barepp.launch.run import run as run
    from barepp.plan.balance import balance as balance
    from barepp.plan.layer_costs import LayerCost as LayerCost
    from barepp.plan.layer_costs import stage_costs as stage_costs
    from barepp.plan.simulate import Costs as Costs
    from barepp.plan.simulate import simulate as simulate
    from barepp.program.actions import Action as Action
    from barepp.program.actions import Kind as Kind
    from barepp.schedules import Schedule as Schedule
    from barepp.schedules import make_schedule as make_schedule
    from barepp.schedules import schedule_names as schedule_names
    from barepp.trace.collect import write_trace as write_trace
    from barepp.trace.recorder import Recorder as Recorder
    from barepp.trace.summary import Summary as Summary
    from barepp.trace.summary import summarise as summarise
    from barepp.train.layer_profiler import profile as profile
    from barepp.train.loss_scaler import LossScaler as LossScaler
    from barepp.train.models import mlp as mlp
    from barepp.train.pipeline import Pipeline as Pipeline
    from barepp.train.stage.seeding import derive_seed as derive_seed
    from barepp.train.stage.stage import Stage as Stage
    from barepp.worker.init import init as init
    from barepp.worker.init import launched as launched
    from barepp.worker.world import World as World
    from transport.errors import Failure as Failure
    from transport.errors import JobFailed as JobFailed
else:
    __all__ = sorted(name for names in _NAMES.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    for home, names in _NAMES.items():
        if name in names:
            module = importlib.import_module(home)
            value = module if home == f"{__name__}.{name}" else getattr(module, name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
