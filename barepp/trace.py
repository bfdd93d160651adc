"""What a rank did and when: sums for every step, and every span when tracing is on.

A step's time on one rank is split into three parts, so that waiting never counts as anything else:

    computing   inside an action: torch's forward or backward
    waiting     blocked on a message that is not here yet: the bubble, and time for a core
    moving      the rest: splitting, posting, sending, bookkeeping
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from barepp.actions import Action, Kind
from transport.collectives import all_reduce

if TYPE_CHECKING:
    from barepp.world import World

_KINDS = tuple(Kind)
_SPAN_TAG = -10  # negative tags are ours: a user's can never meet them


KEPT_STEPS: Final = 1000  # older ones are forgotten, so that a long run stays small


class StepTimes(NamedTuple):
    """One step on one rank, in nanoseconds."""

    step: int
    compute: int
    wait: int


@dataclasses.dataclass
class Recorder:
    """Collects one rank's times, in nanoseconds of `time.perf_counter_ns`.

    `steps` are the last `KEPT_STEPS` steps; `spans`, when tracing, are all there were.
    """

    tracing: bool = False
    steps: deque[StepTimes] = dataclasses.field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    spans: list[tuple[Action, int, int, int]] = dataclasses.field(default_factory=list)
    _began: int = 0
    _computed: int = 0
    _waited: int = 0

    def begin_step(self) -> None:
        """Start a step's clock."""
        self._began = time.perf_counter_ns()
        self._computed = self._waited = 0

    def add(self, compute_ns: int, wait_ns: int) -> None:
        """Add to the current step what was spent computing and waiting."""
        self._computed += compute_ns
        self._waited += wait_ns

    def end_step(self) -> None:
        """Stop the clock and take the step's sums."""
        took = time.perf_counter_ns() - self._began
        self.steps.append(StepTimes(took, self._computed, self._waited))


@dataclasses.dataclass(frozen=True)
class Summary:
    """Times of the last steps over all ranks, the very first left out if others are there.

    bubble = 1 - computing / (ranks * step time), as `barepp.plan` defines it for the prediction. A
    step lasts from the call of `Pipeline.step` to its loss, on the rank where that takes longest.
    """

    step_ms: float
    bubble: float
    computing_ms: list[float]  # per rank, the mean of a step
    waiting_ms: list[float]
    moving_ms: list[float]
    peak_in_flight: list[int]


def summarise(world: World, recorder: Recorder, peak_in_flight: int) -> Summary:
    """Put all ranks' sums together; collective, the same result on every rank."""
    # The first step warms up. (When some were forgotten, one more does not matter.)
    steps = list(recorder.steps)[1:] or list(recorder.steps)
    took = [times.step for times in steps]
    mine = torch.zeros(world.world_size, 6, dtype=torch.float64)
    mine[world.rank] = torch.tensor(
        [
            statistics.median(took) if took else 0.0,
            sum(took),
            sum(times.compute for times in steps),
            sum(times.wait for times in steps),
            len(steps),
            peak_in_flight,
        ],
        dtype=torch.float64,
    )
    table = all_reduce(world.transport, mine) if world.world_size > 1 else mine
    median, total, computing, waiting, count, peak = table.T
    count = count.clamp(min=1)
    longest = world.world_size * total.max()
    moving = (total - computing - waiting) / count
    return Summary(
        step_ms=float(median.max()) / 1e6,
        bubble=1 - float(computing.sum() / longest) if float(longest) else 0.0,
        computing_ms=(computing / count / 1e6).tolist(),
        waiting_ms=(waiting / count / 1e6).tolist(),
        moving_ms=(moving / 1e6).tolist(),
        peak_in_flight=[int(value) for value in peak.tolist()],
    )


def write_trace(world: World, recorder: Recorder, path: str | Path) -> None:
    """Gather every rank's spans on rank 0 and write them there as Chrome trace events; collective.

    The file opens in Perfetto or chrome://tracing, one row a rank. Format: "Trace Event Format",
    complete events ("ph": "X") with times in microseconds. Ranks share one clock because they
    share one host (CLOCK_MONOTONIC).
    """
    rows = [
        [a.stage, _KINDS.index(a.kind), a.microbatch, waited, start, end]
        for a, waited, start, end in recorder.spans
    ]
    mine = torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)
    if world.rank != 0:
        world.transport.send(mine, 0, _SPAN_TAG)
        return
    others = range(1, world.world_size)
    tables = [mine, *(world.transport.recv(rank, _SPAN_TAG) for rank in others)]
    origin = min((int(table[:, 3].min()) for table in tables if len(table)), default=0)
    events: list[dict[str, object]] = []
    for rank, table in enumerate(tables):
        name = {"name": f"rank {rank}"}
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": name})
        for stage, kind, microbatch, waited, start, end in table.tolist():
            action = str(Action(stage, _KINDS[kind], microbatch))
            spans = [("waiting", waited, start), (action, start, end)]
            events += [
                {
                    "ph": "X",
                    "name": label,
                    "cat": "wait" if label == "waiting" else _KINDS[kind].value,
                    "pid": 0,
                    "tid": rank,
                    "ts": (begin - origin) / 1e3,
                    "dur": (finish - begin) / 1e3,
                }
                for label, begin, finish in spans
                if finish > begin
            ]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
