"""Ranks as threads of one process: the launcher's part of `barepp.run(..., transport="inproc")`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from barepp.launch.hang_detector import HangDetector
from barepp.train.stage.seeding import PROCESS_LOCK
from barepp.worker.devices import gpu_of, num_gpus, on_gpus
from barepp.worker.failures import failure_of
from barepp.worker.heartbeat import script_threads
from barepp.worker.init import one_compute_thread
from barepp.worker.spec import Call, Options
from barepp.worker.world import World
from transport.errors import Failure, JobFailed, WaitTimeout
from transport.inproc import InprocHub, InprocTransport
from transport.rendezvous.client import BEAT_S


class Crew:
    """What the launcher is to processes: ends barriers, hears the first failure, tells everyone."""

    def __init__(self, world_size: int, device: str = "cpu") -> None:
        hub, found = InprocHub(world_size), num_gpus(device, 0)
        use = on_gpus(device, [found])
        self.transports = [
            InprocTransport(hub, rank, gpu=gpu_of(rank, found) if use else None)
            for rank in range(world_size)
        ]
        self.worlds: list[World] = []
        self.changed = threading.Condition()
        self.failure: Failure | None = None
        self.barriers = [0] * world_size
        self.released = 0
        self.running = 0

    def fail(self, failure: Failure) -> None:
        """Take the first failure as the cause and tell everyone."""
        with self.changed:
            if self.failure is not None:
                return
            self.failure = failure
            self.changed.notify_all()
        for world in self.worlds:
            world.transport.abort(JobFailed(failure, world.position()))

    def over(self, timeout: float) -> bool:
        """Wait `timeout` seconds for the end: whether all ranks have ended, or one has failed."""
        with self.changed:
            return self.changed.wait_for(
                lambda: self.running == 0 or self.failure is not None, timeout
            )


class ThreadControl:
    """One rank's line to the crew; see `world.Control`."""

    def __init__(self, crew: Crew, rank: int) -> None:
        self._crew = crew
        self._rank = rank
        self._timed_out = False  # the barrier that was called last

    def barrier(self, timeout: float | None = None, *, last: bool = False) -> None:
        """Block until every rank has called; one that timed out is waited for again."""
        crew = self._crew
        with crew.changed:
            # Not "is it released?": the release may have come since the call that timed out.
            begun = self._timed_out
            if last and begun:
                self._wait(timeout)
            if last or not begun:
                crew.barriers[self._rank] += 1
                crew.released = min(crew.barriers)
                crew.changed.notify_all()
            self._wait(timeout)

    def _wait(self, timeout: float | None) -> None:
        crew = self._crew
        due = crew.barriers[self._rank]
        crew.changed.wait_for(lambda: crew.released >= due or crew.failure is not None, timeout)
        self._timed_out = crew.released < due and crew.failure is None
        if self._timed_out:
            raise WaitTimeout(f"rank {self._rank}: nothing after {timeout} s at a barrier")
        if crew.released < due and crew.failure is not None:
            raise JobFailed(crew.failure, "waiting at a barrier")

    def at_barrier(self) -> bool:
        """Whether a barrier that this rank has called is not over."""
        return self._crew.barriers[self._rank] > self._crew.released

    def report(self, failure: Failure) -> None:
        """Tell that this rank failed."""
        self._crew.fail(failure)

    def leave(self) -> None:
        """Nobody needs to hear it."""


def run_threads(call: Call, options: Options) -> list[Any]:
    """Make the call in a thread a rank; see `run.run`. Of the options threads need only some."""
    crew = Crew(options.world_size, options.device)
    results: list[Any] = [None] * options.world_size
    crew.worlds = [
        World(transport, ThreadControl(crew, rank), PROCESS_LOCK)
        for rank, transport in enumerate(crew.transports)
    ]

    def be_rank(world: World) -> None:
        one_compute_thread()
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # of this thread
        note_told = None
        if options.fault_plan is not None:
            from barepp.worker.faults.fault_hook import carry_out

            note_told, world.fault_hook = carry_out(world.rank, options.fault_plan)
        try:
            with world:
                results[world.rank] = call.function(world, *call.args)
        except JobFailed as error:
            if note_told is not None:
                note_told(error)
        except BaseException as error:
            crew.fail(failure_of(world.rank, error, world.position()))
        finally:
            with crew.changed:
                crew.running -= 1
                crew.changed.notify_all()

    threads = [
        threading.Thread(
            target=be_rank, args=(world,), name=f"barepp-rank-{world.rank}", daemon=True
        )
        for world in crew.worlds
    ]
    try:
        for thread in threads:
            with crew.changed:
                crew.running += 1
            thread.start()
        _watch(threads, crew, options.timeout_s)
        _wait_for(threads, crew, options.grace_s)
    except BaseException as error:  # Ctrl-C
        crew.fail(Failure(-1, "signal", f"the caller was interrupted by {type(error).__name__}"))
        _wait_for(threads, crew, options.grace_s)
        raise
    if crew.failure is not None:
        raise JobFailed(crew.failure)
    return results


def _watch(threads: list[threading.Thread], crew: Crew, timeout_s: float) -> None:
    """Wait until all threads have ended or one has failed; find it if they hang.

    The ranks' threads are watched as processes are, but for their silence: one that keeps Python's
    lock silences us as well.
    """
    watch = HangDetector(range(len(threads)), heartbeat_s=0.0, timeout_s=timeout_s)
    me = threading.get_ident()

    def those_of(rank: threading.Thread) -> Callable[[], list[int]]:
        # A thread that is neither a rank's nor ours may do anything for any rank.
        return lambda: [rank.ident or 0, *(other for other in script_threads() if other != me)]

    while not crew.over(BEAT_S):
        for world, thread in zip(crew.worlds, threads, strict=True):
            watch.beat(world.rank, world.beat(those_of(thread)), time.monotonic())
        hang = watch.check(time.monotonic())
        if hang is not None:
            crew.fail(hang)


def _wait_for(threads: list[threading.Thread], crew: Crew, grace_s: float) -> None:
    """Give the threads `grace_s` seconds to end."""
    with crew.changed:
        ended = crew.changed.wait_for(lambda: crew.running == 0, grace_s)
    if ended:
        for thread in threads:
            if thread.ident is not None:  # Ctrl-C came before it was started
                thread.join()
