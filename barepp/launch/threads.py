"""Ranks as threads of one process: the launcher's part of `barepp.run(..., transport="inproc")`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from barepp.launch.hang_detector import HangDetector
from barepp.launch.job_state import JobState
from barepp.launch.referee import Lines, Referee
from barepp.train.stage.seeding import PROCESS_LOCK
from barepp.worker.devices import gpu_of, num_gpus, on_gpus
from barepp.worker.failures import failure_of
from barepp.worker.heartbeat import script_threads
from barepp.worker.init import one_compute_thread
from barepp.worker.spec import Call, Options
from barepp.worker.world import World
from transport.errors import Failure, JobFailed
from transport.inproc import InprocHub, InprocTransport
from transport.rendezvous.barrier import RankControl
from transport.rendezvous.client import BEAT_S
from transport.rendezvous.loop import EventLoop


class ThreadControl(RankControl):
    """One rank's line to the crew; see `world.Control`."""

    def __init__(self, crew: Crew, rank: int) -> None:
        super().__init__(rank, crew.changed)
        self._crew = crew

    def call_barrier(self) -> None:
        """End the barriers that all ranks have called for."""
        with self._changed:
            for control in self._crew.controls:
                control.released = min(other.called for other in self._crew.controls)
            self._changed.notify_all()

    def report(self, failure: Failure) -> None:
        """Tell that this rank failed."""
        self._crew.report(failure)

    def leave(self) -> None:
        """Nobody needs to hear it."""


class Crew(Lines):
    """The ranks of one job, and the way between them and their referee.

    The referee belongs to the thread that has called `run_threads`; the ranks' threads tell it what
    happens, and wake it.
    """

    def __init__(self, options: Options) -> None:
        world_size, device = options.world_size, options.device
        hub, found = InprocHub(world_size), num_gpus(device, 0)
        use = on_gpus(device, [found])
        self.changed = threading.Condition()
        self.controls = [ThreadControl(self, rank) for rank in range(world_size)]
        self.worlds = [
            World(
                InprocTransport(hub, rank, gpu=gpu_of(rank, found) if use else None),
                control,
                PROCESS_LOCK,
            )
            for rank, control in enumerate(self.controls)
        ]
        # Nobody watches for silence: a thread that keeps Python's lock silences us as well.
        watch = HangDetector(range(world_size), heartbeat_s=0.0, timeout_s=options.timeout_s)
        self.loop = EventLoop()
        self.job = JobState(options, self.loop, watch)
        self.referee = Referee(self.job, self)
        self.running = 0
        self._reported: deque[Failure] = deque()
        self._closed = False

    def report(self, failure: Failure) -> None:
        """Tell the referee a failure; from a rank's thread."""
        self._reported.append(failure)
        self._wake()

    def end(self) -> None:
        """Take note that a rank's thread ends; called by it."""
        with self.changed:
            self.running -= 1
            self.changed.notify_all()
        self._wake()

    def _wake(self) -> None:
        with self.changed:
            if not self._closed:  # else this thread was left behind, and nobody listens
                self.loop.wake()

    def close(self) -> None:
        """Close the referee's loop."""
        with self.changed:
            self._closed = True
            self.loop.close()

    def tell_failure(self, failure: Failure) -> None:
        """Tell every rank the first failure, wherever it waits."""
        with self.changed:
            for control in self.controls:
                control.failure = failure
            self.changed.notify_all()
        for world in self.worlds:
            world.transport.abort(JobFailed(failure, world.position()))

    def watch(self, threads: list[threading.Thread]) -> None:
        """Serve the referee until all threads have ended or one has failed; find it if they hang.

        The ranks' threads are watched as processes are, but for their silence.
        """
        me = threading.get_ident()

        def those_of(rank: threading.Thread) -> Callable[[], list[int]]:
            # A thread that is neither a rank's nor ours may do anything for any rank.
            return lambda: [rank.ident or 0, *(other for other in script_threads() if other != me)]

        def beat() -> None:
            for world, thread in zip(self.worlds, threads, strict=True):
                self.job.watch.beat(world.rank, world.beat(those_of(thread)), time.monotonic())
            self.referee.check_hang()
            self.loop.call_at(time.monotonic() + BEAT_S, beat)

        self.loop.call_at(time.monotonic() + BEAT_S, beat)
        while True:
            over = self.running == 0  # (asked first: its report came before its end)
            while self._reported:
                self.referee.fail(self._reported.popleft())
            if over or self.referee.failure is not None:
                return
            self.loop.turn()

    def join(self, threads: list[threading.Thread], grace_s: float) -> None:
        """Give the threads `grace_s` seconds to end."""
        with self.changed:
            ended = self.changed.wait_for(lambda: self.running == 0, grace_s)
        if ended:
            for thread in threads:
                if thread.ident is not None:  # Ctrl-C came before it was started
                    thread.join()


def run_threads(call: Call, options: Options) -> list[Any]:
    """Make the call in a thread a rank; see `run.run`. Of the options threads need only some."""
    crew = Crew(options)
    results: list[Any] = [None] * options.world_size

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
            crew.report(failure_of(world.rank, error, world.position()))
        finally:
            crew.end()

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
        crew.watch(threads)
        crew.join(threads, options.grace_s)
    except BaseException as error:  # Ctrl-C
        interrupted = f"the caller was interrupted by {type(error).__name__}"
        crew.referee.fail(Failure(-1, "signal", interrupted))
        crew.join(threads, options.grace_s)
        raise
    finally:
        crew.close()
    if crew.referee.failure is not None:
        raise JobFailed(crew.referee.failure)
    return results
