"""A rank's part in a test of failures: lets its fault happen, and notes what it is told.

1. A world has no probe, unless a test gave it one: then the executor asks once a step and once an
   action, whether there is one.
2. Only the action that is meant is watched from inside; all others run as ever.
3. The moment is written down before the fault happens: afterwards there may be nobody to do so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from barepp.errors import UsageError
from barepp.program.actions import Action, Kind
from barepp.program.lowering import Step
from barepp.worker.faults.kinds import Fault, fault_action
from barepp.worker.spec import FaultPlan
from transport.errors import JobFailed
from transport.private_names import after_each_operation

# How many new tensors an action makes before its "during". By the second one a forward is in its
# layers and a backward in autograd's engine: the first one may be no more than the seed of either.
_NEW_TENSORS: Final = 2

Result = TypeVar("Result")
Method = Callable[[Action, Result], Result]


def carry_out(rank: int, plan: FaultPlan) -> tuple[Callable[[JobFailed], None], FaultHook | None]:
    """Return who writes down what a rank was told, and what lets the rank fail if it is to."""

    def note(event: str, **fields: object) -> None:
        record = {"event": event, "monotonic": time.monotonic(), **fields}
        with (Path(plan.folder) / f"rank{rank}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def note_told(error: JobFailed) -> None:
        note("told", failure=error.failure.to_record(), doing=error.doing)

    return note_told, FaultHook(plan.fault, note) if rank == plan.fault.rank else None


class FaultHook:
    """Lets `fault` happen, once, and notes the moment as the event "injected"."""

    def __init__(self, fault: Fault, note: Callable[..., None]) -> None:
        self._fault = fault
        self._note = note
        self._armed = False
        self._happened = False

    def around(
        self, methods: Mapping[Kind, Method[Result]], program: Sequence[Step], step: int
    ) -> Mapping[Kind, Method[Result]]:
        """Return what computes the actions of a training step; called as it begins.

        Raises:
            UsageError: the fault's action is not one of this rank's.
        """
        fault = self._fault
        training = bool(methods.keys() - {Kind.F})  # an evaluation has forwards alone
        self._armed = training and step == fault.step and not self._happened
        if not self._armed:
            return methods
        if all(own.action != fault.at for own in program):
            actions = " ".join(str(own.action) for own in program)
            text = f"rank {fault.rank} has no {fault.at} in step {step}, so no fault can happen at"
            why = f"{text} it; its actions are {actions}"
            self._note("absent", why=why)
            raise UsageError(why)
        compute = methods[fault.at.kind]

        def watched(action: Action, taken: Result) -> Result:
            if action != fault.at or fault.when == "after":
                return compute(action, taken)
            if fault.when == "before":
                self._happen()
                return compute(action, taken)
            with after_each_operation(_Midway(self._happen)):
                made = compute(action, taken)
                self._happen()  # if it made too few tensors to have a midst
                return made

        return {**methods, fault.at.kind: watched}

    def after(self, action: Action) -> None:
        """Take note that an action is over, and its result handed to the transport."""
        if self._armed and action == self._fault.at and self._fault.when == "after":
            self._happen()

    def _happen(self) -> None:
        if self._happened:
            return
        self._happened, self._armed = True, False
        self._note("injected")
        fault_action(self._fault.what).do()


class _Midway:
    """Calls back in the midst of torch's work, between two operations, forwards or backwards.

    It is told of each operation of this thread, those of autograd's engine and of a recomputation
    as well: so this needs to know neither layers nor how a backward is done.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._left = _NEW_TENSORS

    def __call__(self, operation: Any, made: Any) -> None:
        is_view = getattr(operation, "is_view", False)
        if self._left and not is_view and isinstance(made, (torch.Tensor, tuple, list)):
            self._left -= 1
            if not self._left:
                self._call()
