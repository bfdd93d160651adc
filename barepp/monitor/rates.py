"""Rates, which take two looks at a job; and CPU time and memory, which the kernel tells."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

import psutil

from barepp.monitor.client import Line
from barepp.monitor.status import SILENT_S, JobStatus, RankStatus

WINDOW_S: Final = 5.0  # over which rates are taken, so that they do not jump


@dataclasses.dataclass(frozen=True)
class RankRates:
    """One rank at one moment; None stands for what is not known.

    Attributes:
        status: what its launcher says about it.
        state: what it does; the kernel knows more, because a stopped process says nothing.
        state_s: for how many seconds it has done so.
        microbatches_per_s, received_per_s, sent_per_s: the last two in bytes.
        cpu_percent: of one core, since the look before.
        rss_nbytes: its resident memory.
    """

    status: RankStatus
    state: str
    state_s: float | None
    microbatches_per_s: float | None = None
    received_per_s: float | None = None
    sent_per_s: float | None = None
    cpu_percent: float | None = None
    rss_nbytes: int | None = None


class Rates:
    """Makes rates of one status after the other of one job.

    `local` is whether the process ids that the launcher tells mean the same here.
    """

    def __init__(self, *, local: bool) -> None:
        self._local = local
        # Of each rank: seconds of its own clock, microbatches, bytes received and sent by then.
        self._counts: dict[int, deque[list[float]]] = {}
        self._processes: dict[int, psutil.Process] = {}

    def take(self, ranks: Sequence[RankStatus]) -> list[RankRates]:
        """Return the rates of each rank; the first time there are none."""
        return [self._read(status) for status in ranks]

    def _read(self, status: RankStatus) -> RankRates:
        cpu_percent = rss_nbytes = None
        state, state_s = status.state, status.state_s
        if (status.silent_s or 0.0) > SILENT_S:
            state, state_s = f"silent; last heard: {state}", status.silent_s
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if self._local and status.pid:
                known = self._processes.get(status.pid)
                process = known or psutil.Process(status.pid)
                with process.oneshot():
                    if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                        state = f"stopped; last heard: {status.state}"
                        state_s = status.silent_s
                    rss_nbytes = process.memory_info().rss or None  # (0: it is just ending)
                    percent = process.cpu_percent()  # since the last call
                cpu_percent = percent if known else None
                self._processes[process.pid] = process
        done, received, sent = self._rates(status) or (None, None, None)
        return RankRates(status, state, state_s, done, received, sent, cpu_percent, rss_nbytes)

    def _rates(self, status: RankStatus) -> tuple[float, float, float] | None:
        """Return microbatches, bytes received and bytes sent a second; None when not known."""
        counts = status.microbatches, status.received_nbytes, status.sent_nbytes
        now = [count for count in (status.measured_at, *counts) if count is not None]
        if len(now) < 4:
            return None
        history = self._counts.setdefault(status.rank, deque())
        if (status.silent_s or 0.0) > SILENT_S:
            history.clear()  # what it does now is not known
            return None
        if history and any(new < old for new, old in zip(now, history[-1], strict=True)):
            history.clear()  # a new world, which counts from 0
        if not history or now[0] > history[-1][0]:
            history.append(now)
        while len(history) > 2 and history[1][0] <= now[0] - WINDOW_S:
            history.popleft()
        seconds, *more = (new - old for new, old in zip(history[-1], history[0], strict=True))
        if not seconds:
            return None
        done, received, sent = (count / seconds for count in more)
        return done, received, sent


def looks(
    line: Line, interval_s: float, stop: threading.Event
) -> Iterator[tuple[JobStatus, list[RankRates]]]:
    """Yield a job and its ranks' rates, every `interval_s` seconds until `stop` is set.

    Raises:
        JobEnded, NobodyAnswers: there is nothing more to see.
    """
    job, ranks = line.status()
    readings = Rates(local=line.launcher_pid == job.pid)
    yield job, readings.take(ranks)
    while not stop.wait(interval_s):
        job, ranks = line.status()
        yield job, readings.take(ranks)
