"""A rank's part in a test of failures: it makes its fault happen, and notes what it is told.

1. A world has no hook, unless a test gave it one. Then the hook wraps what computes an action and
   what gives its result on, in one step; all other steps run as ever.
2. Only the action that is meant is watched from inside; all others run as ever.
3. The moment is written down before the fault happens: afterwards the process may be dead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from barepp.errors import UsageError
from barepp.program.actions import Action
from barepp.program.lowering import Step
from barepp.worker.faults.kinds import Fault, fault_action
from barepp.worker.spec import FaultPlan
from transport.errors import JobFailed
from transport.private_names import after_each_operation

# How many new tensors an action makes before its "during". By the second one a forward is in its
# layers and a backward in autograd's engine: the first one may be no more than the seed of either.
_NEW_TENSORS: Final = 2

Result = TypeVar("Result")
Compute = Callable[[Action, Result], Result]
Give = Callable[[Step, Result], None]


def carry_out(rank: int, plan: FaultPlan) -> tuple[Callable[[JobFailed], None], FaultHook | None]:
    """Return what notes the failure that a rank was told, and the hook if this rank is to fail."""

    def note(event: str, **fields: object) -> None:
        record = {"event": event, "monotonic": time.monotonic(), **fields}
        with (Path(plan.folder) / f"rank{rank}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def note_told(error: JobFailed) -> None:
        note("told", failure=error.failure.to_record(), doing=error.doing)

    return note_told, FaultHook(plan.fault, note) if rank == plan.fault.rank else None


class FaultHook:
    """Makes `fault` happen, once, and notes the moment as the event "injected"."""

    def __init__(self, fault: Fault, note: Callable[..., None]) -> None:
        self._fault = fault
        self._note = note
        self._happened = False

    def around(
        self, compute: Compute[Result], give: Give[Result], program: Sequence[Step], step: int
    ) -> tuple[Compute[Result], Give[Result]]:
        """Return what computes a training step's actions and gives the results on.

        Raises:
            UsageError: the fault's action is not one of this rank's.
        """
        fault = self._fault
        if step != fault.step or self._happened:
            return compute, give
        if all(own.action != fault.at for own in program):
            actions = " ".join(str(own.action) for own in program)
            text = f"rank {fault.rank} has no {fault.at} in step {step}, so no fault can happen at"
            why = f"{text} it; its actions are {actions}"
            self._note("absent", why=why)
            raise UsageError(why)

        def compute_and_fail(action: Action, taken: Result) -> Result:
            if action != fault.at or fault.when == "after":
                return compute(action, taken)
            if fault.when == "before":
                self._happen()
                return compute(action, taken)
            with after_each_operation(_Midway(self._happen)):
                made = compute(action, taken)
                self._happen()  # if it made too few tensors to have a midst
                return made

        def give_and_fail(own: Step, made: Result) -> None:
            give(own, made)
            if own.action == fault.at and fault.when == "after":
                self._happen()

        return compute_and_fail, give_and_fail

    def _happen(self) -> None:
        if self._happened:
            return
        self._happened = True
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
