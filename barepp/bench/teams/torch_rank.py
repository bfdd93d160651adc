"""A rank of torch.distributed.pipelining over gloo as a member of a team: what barepp is held to.

The only file of barepp/ that imports torch.distributed.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import pipelining

from barepp.bench.case import Case, gradient_square
from barepp.bench.teams.member import serve, timed
from barepp.plan.partition import partition

SCHEDULES: Final = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}


class TorchRank:
    """One rank; a stage and a schedule for each schedule that is asked for."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._case = Case()
        self._built: dict[str, tuple[Any, Any]] = {}

    def build(self, case: Case) -> None:
        """Forget the last case; the stages are built when they are asked for."""
        self._case = case
        self._built.clear()

    def train(self, schedule: str, steps: int) -> dict[str, Any]:
        """Run steps."""
        if schedule not in self._built:
            self._built[schedule] = self._make(schedule)
        module, runner = self._built[schedule]
        inputs, targets = self._case.data()
        given: dict[str, Any] = {}
        if "return_outputs" in inspect.signature(runner.step).parameters:
            given["return_outputs"] = False  # barepp returns the loss alone, too
        if self._rank == self._world_size - 1:
            given |= {"target": targets, "losses": []}

        def step() -> None:
            runner.step(*([inputs] if self._rank == 0 else []), **given)

        answer = timed(steps, module.zero_grad, step)
        return {**answer, "gradient_square": gradient_square(module.parameters())}

    def _make(self, schedule: str) -> tuple[Any, Any]:
        case = self._case
        layers = partition(len(case.builders()), self._world_size)[self._rank]
        module = case.build(layers)
        # It is told all shapes beforehand. It could find them out at the first step, but not on a
        # machine without numpy; the steps that are timed are the same.
        rows = case.batch // case.microbatches
        example = case.data()[0][:rows] if self._rank == 0 else torch.empty(rows, case.hidden)
        example.requires_grad_(self._rank > 0)
        stage = pipelining.PipelineStage(
            module,
            self._rank,
            self._world_size,
            torch.device("cpu"),
            input_args=example,
            output_args=module(example),
        )
        return module, SCHEDULES[schedule](stage, case.microbatches, loss_fn=case.loss)


def main(world_size: int, rank: int, path: str) -> None:
    """Join gloo's group, whose members meet in a file beside `path`, and serve the conductor."""
    torch.set_num_threads(1)
    meeting = dist.FileStore(f"{path}.store", world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world_size)
    serve(path, rank, TorchRank(rank, world_size))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
