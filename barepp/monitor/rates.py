"""What two looks at a job make more than one: rates; and what the kernel says of its processes."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import psutil

from barepp.monitor.client import Line
from barepp.monitor.status import SILENT_S, JobStatus, RankStatus

WINDOW_S: Final = 5.0  # over which rates are taken, so that they do not jump


class Counts(NamedTuple):
    """What a rank had counted at one time, in seconds of its own clock."""

    at: float
    microbatches: float
    received_nbytes: int
    sent_nbytes: int


@dataclasses.dataclass(frozen=True)
class RankRates:
    """One rank at one moment; None is what nobody knows.

    Attributes:
        status: what its launcher says of it.
        state: the same in the light of what the kernel says: a stopped process says nothing.
        state_s: since how many seconds.
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
    """Takes one status after the other of one job and makes readings of them.

    `local` is whether the process ids that the launcher tells mean the same here.
    """

    def __init__(self, *, local: bool) -> None:
        self._local = local
        self._counts: dict[int, deque[Counts]] = {}
        self._processes: dict[int, psutil.Process] = {}

    def take(self, ranks: Sequence[RankStatus]) -> list[RankRates]:
        """Return a reading of each rank. The first ones know no rates."""
        return [self._read(status) for status in ranks]

    def _read(self, status: RankStatus) -> RankRates:
        cpu_percent = rss_nbytes = None
        state, state_s = status.state, status.state_s
        if status.silent_s is not None and status.silent_s > SILENT_S:
            state, state_s = f"silent; last heard: {state}", status.silent_s
        process = self._process(status)
        if process is not None:
            known = status.pid in self._processes
            try:
                with process.oneshot():
                    if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                        state = f"stopped; last heard: {status.state}"
                        state_s = status.silent_s
                    rss_nbytes = process.memory_info().rss or None  # (0: it is just ending)
                    percent = process.cpu_percent()  # since the last call
                cpu_percent = percent if known else None
                self._processes[process.pid] = process
            except psutil.Error:  # it has ended meanwhile
                pass
        done, received, sent = self._rates(status)
        return RankRates(status, state, state_s, done, received, sent, cpu_percent, rss_nbytes)

    def _process(self, status: RankStatus) -> psutil.Process | None:
        if not self._local or not status.pid:
            return None
        try:
            return self._processes.get(status.pid) or psutil.Process(status.pid)
        except psutil.Error:
            return None

    def _rates(self, status: RankStatus) -> tuple[float | None, float | None, float | None]:
        unknown = None, None, None
        if (
            status.measured_at is None
            or status.microbatches is None
            or status.received_nbytes is None
            or status.sent_nbytes is None
        ):
            return unknown
        now = Counts(
            status.measured_at, status.microbatches, status.received_nbytes, status.sent_nbytes
        )
        history = self._counts.setdefault(status.rank, deque())
        if (status.silent_s or 0.0) > SILENT_S:
            history.clear()  # what it does now, nobody knows
            return unknown
        if history and any(new < old for new, old in zip(now, history[-1], strict=True)):
            history.clear()  # a new world, which counts from 0
        if not history or now.at > history[-1].at:
            history.append(now)
        while len(history) > 2 and history[1].at <= now.at - WINDOW_S:
            history.popleft()
        first, last = history[0], history[-1]
        seconds = last.at - first.at
        if not seconds:
            return unknown
        return (
            (last.microbatches - first.microbatches) / seconds,
            (last.received_nbytes - first.received_nbytes) / seconds,
            (last.sent_nbytes - first.sent_nbytes) / seconds,
        )


def looks(
    line: Line, interval_s: float, stop: threading.Event
) -> Iterator[tuple[JobStatus, list[RankRates]]]:
    """Yield what can be seen of a job, every `interval_s` seconds until `stop` is set.

    Raises:
        JobEnded, NobodyAnswers: there is nothing more to see.
    """
    job, ranks = line.status()
    readings = Rates(local=line.launcher_pid == job.pid)
    yield job, readings.take(ranks)
    while not stop.wait(interval_s):
        job, ranks = line.status()
        yield job, readings.take(ranks)
