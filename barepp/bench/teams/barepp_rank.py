"""A rank of barepp as a member of a team: the same `Pipeline` that a script uses, nothing else."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from barepp.bench.case import SEED, Case, gradient_square
from barepp.bench.teams.member import serve, timed
from barepp.trace.recorder import Recorder
from barepp.trace.summary import summarise
from barepp.train.pipeline import Pipeline
from barepp.worker.init import init
from barepp.worker.world import World


class BareppRank:
    """One rank; a pipeline for each schedule that is asked for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._case = Case()
        self._pipelines: dict[tuple[str, str], Pipeline] = {}

    def build(self, case: Case) -> None:
        """Forget the last case; the pipelines are built when they are asked for."""
        self._case = case
        self._pipelines.clear()

    def train(self, schedule: str, steps: int, partition: str = "uniform") -> dict[str, Any]:
        """Run steps; the summary is all ranks' together."""
        case, pipe = self._case, self._pipelines.get((schedule, partition))
        inputs, targets = case.data()
        if pipe is None:
            pipe = self._pipelines[schedule, partition] = Pipeline(
                self._world,
                case.builders(),
                case.loss,
                schedule=schedule,
                num_microbatches=case.microbatches,
                partition=partition,
                seed=SEED,
                sample=(inputs, targets),
            )
        pipe.recorder = Recorder()
        answer = timed(steps, partial(self._prepare, pipe), lambda: pipe.step(inputs, targets))
        summary = summarise(self._world, pipe.recorder, pipe.peak_in_flight)
        return {
            **answer,
            "gradient_square": gradient_square(pipe.parameters()),
            "bubble": summary.bubble,
            "partition": pipe.partition,
            "computing_ms": summary.computing_ms,
            "waiting_ms": summary.waiting_ms,
            "moving_ms": summary.moving_ms,
        }

    def _prepare(self, pipe: Pipeline) -> None:
        pipe.zero_grad()
        if self._case.sleep_s:
            # A prediction is for one step that all ranks begin together. Left alone, a rank begins
            # the next one when it has the loss: in zb_v rank 0 does while others are at the last.
            self._world.barrier()


def main() -> None:
    """Run as a rank of the launcher's; the argument is the conductor's path."""
    with init() as world:
        serve(sys.argv[1], world.rank, BareppRank(world))
