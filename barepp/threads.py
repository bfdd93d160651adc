"""Ranks as threads of one process: the launcher's part of `barepp.run(..., transport="inproc")`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from barepp.assignment import Rehearsal
from barepp.beats import IN_SCRIPT
from barepp.failures import failure_of
from barepp.joining import one_compute_thread
from barepp.probe import note_told, rehearse
from barepp.seeding import PROCESS_LOCK
from barepp.world import World
from transport.errors import Failure, JobFailed, WaitTimeout
from transport.inproc import InprocHub


class Crew:
    """What the launcher is to processes: ends barriers, hears the first failure, tells everyone."""

    def __init__(self, world_size: int) -> None:
        self.transports = InprocHub(world_size).transports()
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
            world.transport.abort(JobFailed(failure, world.position() or IN_SCRIPT))


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
        """Whether a barrier that this rank has called is not over: asked for by nobody here."""
        return False

    def report(self, failure: Failure) -> None:
        """Tell that this rank failed."""
        self._crew.fail(failure)

    def leave(self) -> None:
        """Nobody needs to hear it."""


def run_threads(
    function: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    grace_s: float,
    rehearsal: Rehearsal | None = None,
) -> list[Any]:
    """Call `function(world, *args)` in a thread a rank; see `run.run`."""
    crew = Crew(world_size)
    results: list[Any] = [None] * world_size
    crew.worlds = [
        World(transport, ThreadControl(crew, rank), PROCESS_LOCK)
        for rank, transport in enumerate(crew.transports)
    ]

    def be_rank(world: World) -> None:
        one_compute_thread()
        notes, world.probe = rehearse(world.rank, rehearsal)
        try:
            with world:
                results[world.rank] = function(world, *args)
        except JobFailed as error:
            note_told(notes, world.rank, error)
        except BaseException as error:
            crew.fail(failure_of(world.rank, error, world.position()))
        finally:
            notes.close()
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
        _wait_for(threads, crew, grace_s)
    except BaseException as error:  # Ctrl-C
        crew.fail(Failure(-1, "signal", f"the caller was interrupted by {type(error).__name__}"))
        _wait_for(threads, crew, grace_s)
        raise
    if crew.failure is not None:
        raise JobFailed(crew.failure)
    return results


def _wait_for(threads: list[threading.Thread], crew: Crew, grace_s: float) -> None:
    """Wait until all threads have ended, or `grace_s` seconds after a failure."""
    with crew.changed:
        crew.changed.wait_for(lambda: crew.running == 0 or crew.failure is not None)
        crew.changed.wait_for(lambda: crew.running == 0, grace_s)
        ended = crew.running == 0
    if ended:
        for thread in threads:
            if thread.ident is not None:  # Ctrl-C came before it was started
                thread.join()
