"""One process as a member of a team: plain torch on the same batch, and what each action costs."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn

from barepp.bench.case import SEED, Case, gradient_square
from barepp.bench.teams.member import serve, timed
from barepp.plan.partition import partition
from barepp.train.batch import microbatch_sizes, split
from barepp.train.stage.stage import Stage


class OneProcess:
    """The whole model in one process."""

    def __init__(self) -> None:
        self._case = Case()
        self._model = nn.Sequential()
        self._stages: dict[int, list[Stage]] = {}

    def build(self, case: Case) -> None:
        """Build the whole model; the stages for `costs` are built when they are asked for."""
        self._case = case
        self._model = case.build(range(len(case.builders())))
        self._stages.clear()

    def train(self, schedule: str, steps: int) -> dict[str, Any]:
        """Accumulate the microbatches' gradients in order, as a person would without barepp."""
        case, model = self._case, self._model
        inputs, targets = case.data()
        sizes = microbatch_sizes(case.batch, case.microbatches)

        def step() -> None:
            for x, y in zip(torch.split(inputs, sizes), torch.split(targets, sizes), strict=True):
                (case.loss(model(x), y) * (len(y) / case.batch)).backward()  # type: ignore[no-untyped-call]

        answer = timed(steps, model.zero_grad, step)
        return {**answer, "gradient_square": gradient_square(model.parameters())}

    def costs(self, stages: int, steps: int) -> dict[str, Any]:
        """Return the seconds of one forward and of one backward of each stage, for each step.

        The stages are barepp's own and run one after the other, undisturbed: all microbatches
        forwards through one stage, then the next, and back again.
        """
        case = self._case
        if stages not in self._stages:
            builders = case.builders()
            self._stages[stages] = [
                Stage(index, layers, stages, builders, case.loss, seed=SEED)
                for index, layers in enumerate(partition(len(builders), stages))
            ]
        rows = [self._one_step(self._stages[stages], index) for index in range(steps)]
        return {"forward": [row[0] for row in rows], "backward": [row[1] for row in rows]}

    def _one_step(self, stages: list[Stage], step: int) -> tuple[list[float], list[float]]:
        case = self._case
        sizes = microbatch_sizes(case.batch, case.microbatches)
        inputs, targets = case.data()
        values: list[Any] = list(split(inputs, sizes))
        parts, count = split(targets, sizes), len(sizes)
        forward, backward = [], []
        for stage in stages:
            for parameter in stage.parameters():
                parameter.grad = None
            began = time.perf_counter()
            values = [
                stage.forward(
                    index,
                    value,
                    step=step,
                    target=parts[index] if stage.is_last else None,
                    loss_weight=sizes[index] / case.batch,
                )
                for index, value in enumerate(values)
            ]
            forward.append((time.perf_counter() - began) / count)
        gradients: list[Any] = [None] * count
        for stage in reversed(stages):
            began = time.perf_counter()
            gradients = [stage.backward(index, gradients[index]) for index in range(count)]
            backward.append((time.perf_counter() - began) / count)
        return forward, backward[::-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.argv[1], 0, OneProcess())
