"""One rank's view of the job: its number, its messages, its barriers, and how it leaves.

    with barepp.init() as world:
        world.send(torch.ones(3), dst=1)

1. Leaving the block normally is collective: flush, wait for all, say goodbye.
2. Leaving it by an exception is this rank's failure and is reported before anything is closed.

How a process gets into its world is in worker/init.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

import torch

from barepp.errors import UsageError
from barepp.worker.failures import failure_of
from barepp.worker.heartbeat import AT_BARRIER, Heartbeat, beat_of, script_threads
from transport.collectives import barrier as barrier_over_messages
from transport.collectives import broadcast
from transport.errors import Failure, JobFailed, TransportClosed

if TYPE_CHECKING:
    from barepp.worker.faults.fault_hook import FaultHook
    from transport.base import Transport
    from transport.message.specs import Message, TensorSpec
    from transport.message.work import Work

FLUSH_TIMEOUT_S: Final = 300.0  # how long a rank that leaves waits for others to take its messages


class Control(Protocol):
    """The connection to the authority on failures: the launcher, or the in-process runner."""

    def barrier(self, timeout: float | None = None, *, last: bool = False) -> None:
        """Block until every rank of the world has called; `last` is for leaving the world."""

    def at_barrier(self) -> bool:
        """Whether a barrier that this rank has called is not over."""

    def report(self, failure: Failure) -> None:
        """Tell that this rank failed; never raises."""

    def leave(self) -> None:
        """Say goodbye."""


class World:
    """One rank's view of the job; made by `barepp.init` or handed over by `barepp.run`.

    Attributes:
        rank, world_size: the number of this rank, and of all ranks.
        local_rank: its number among the ranks of its host.
        transport: the point-to-point contract below the methods of this class.
        random_lock: held around whatever draws random numbers when ranks are threads of one
            process (torch's generator is the process's); None when the process has one rank.
        activity: what the rank does now, for error messages; the executor keeps it.
        steps, microbatches: how many training steps it has done, and how many microbatches have
            passed through it, each action being its share of one; for monitoring.
        fault_hook: lets this rank fail at a chosen action; None except in a test of failures.
        left: whether this rank has left in order, so that its process may join the next world.
    """

    def __init__(
        self,
        transport: Transport,
        control: Control | None = None,
        random_lock: threading.Lock | None = None,
        fault_hook: FaultHook | None = None,
        local_rank: int | None = None,
    ) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.world_size = transport.world_size
        self.local_rank = self.rank if local_rank is None else local_rank
        self.random_lock = random_lock
        self.activity: tuple[object, ...] = ()
        self.steps = 0
        self.microbatches = 0.0
        self.fault_hook = fault_hook
        self._control = control
        self.left = False
        self._failed = False
        self._at_barrier: int | None = None  # the thread that waits there without a limit
        self._pid = os.getpid()

    def beat(self, threads: Callable[[], Iterable[int]] = script_threads) -> Heartbeat | None:
        """Return this rank's heartbeat; None once it has left.

        `threads` tells which threads are the rank's, by default all that the script has.
        """
        if self.left or self._failed:
            return None
        beat = beat_of(self.position(), self._waits_for, self.transport.traffic, threads)
        return dataclasses.replace(beat, steps=self.steps, microbatches=self.microbatches)

    def _waits_for(self) -> dict[int, int | None]:
        """Return for each thread that waits without a limit the rank whose message it waits for."""
        waits = dict(self.transport.traffic.waits)
        found = {
            thread: work.peer if work.is_receive else None
            for thread, work in waits.items()
            if work is not None and not work.done
        }
        thread, control = self._at_barrier, self._control
        if thread is not None and control is not None and control.at_barrier():
            found[thread] = AT_BARRIER
        return found

    def position(self) -> str:
        """Return what this rank does now, for example "computing 2F3"; empty when unknown."""
        return " ".join(map(str, self.activity))

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.transport.device

    def synchronize(self) -> None:
        """Block until the device has done all that it was given; on the CPU it always has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def _doing(self, *activity: object) -> Iterator[None]:
        self.activity = activity
        try:
            yield
        finally:
            self.activity = ()

    def isend(self, message: Message, dst: int, tag: int = 0) -> Work:
        """Start to send; see `transport.base.Transport.isend`. Tags are 0 ... 2**62 - 1."""
        return self.transport.isend(message, dst, _user_tag(tag))

    def irecv(
        self,
        src: int,
        tag: int = 0,
        *,
        into: Message | None = None,
        expect: TensorSpec | None = None,
    ) -> Work:
        """Start to receive; see `transport.base.Transport.irecv`."""
        return self.transport.irecv(src, _user_tag(tag), into=into, expect=expect)

    def send(
        self, message: Message, dst: int, tag: int = 0, *, timeout: float | None = None
    ) -> None:
        """Send and block until the tensor may be written again; `timeout` is in seconds."""
        with self._doing("sending to rank", dst, "with tag", tag):
            self.transport.send(message, dst, _user_tag(tag), timeout=timeout)

    def recv(
        self,
        src: int,
        tag: int = 0,
        *,
        into: torch.Tensor | None = None,
        expect: TensorSpec | None = None,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """Block until one tensor of `src` with `tag` is here; `timeout` is in seconds."""
        with self._doing("waiting for a message from rank", src, "with tag", tag):
            return self.transport.recv(
                src, _user_tag(tag), into=into, expect=expect, timeout=timeout
            )

    def broadcast(
        self, message: Message | None, root: int, *, timeout: float | None = None
    ) -> Message:
        """Return the root's message on every rank; the others pass None. Every rank calls it."""
        with self._doing("waiting for a broadcast from rank", root):
            return broadcast(self.transport, message, root, timeout=timeout)

    def barrier(self, timeout: float | None = None) -> None:
        """Block until every rank has called; `timeout` is in seconds.

        A call that timed out may be repeated: it goes on waiting for the same barrier.

        Raises:
            JobFailed: some rank failed and cannot come any more.
            WaitTimeout: the seconds are over.
            TransportClosed: this rank has left the world.
        """
        if self.left or self._failed:
            raise TransportClosed("this rank has left its world: there is no barrier any more")
        with self._doing("waiting at a barrier"):
            self._meet(timeout)

    def _meet(self, timeout: float | None, *, last: bool = False) -> None:
        if self.world_size == 1:
            return
        if self._control is not None:
            self._at_barrier = threading.get_ident() if timeout is None else None
            try:
                self._control.barrier(timeout, last=last)
            finally:
                self._at_barrier = None
        else:
            barrier_over_messages(self.transport, timeout=timeout)

    def close(self, timeout: float | None = None) -> None:
        """Leave: wait for all ranks, send what is queued, say goodbye. Only the first call counts.

        By default the wait for the others has no limit of its own, since they may have work left
        to do; the launcher's `--timeout` ends a job in which nothing moves for too long.

        Raises:
            JobFailed: some rank failed before all had left.
            WaitTimeout: the others did not come within `timeout` seconds.
        """
        if not self._is_in():
            return
        self.activity = ("leaving the world",)
        try:
            self._meet(timeout, last=True)
            self.transport.close(FLUSH_TIMEOUT_S if timeout is None else timeout)
        except BaseException as error:
            self.abandon(error)
            raise
        self.left = True
        if self._control is not None:
            self._control.leave()

    def abandon(self, error: BaseException) -> None:
        """Leave because of an exception: report it, unless it only repeats another rank's."""
        if not self._is_in():
            return
        self._failed = True
        if self._control is None:
            self.transport.abort(TransportClosed(f"this rank failed: {error!r}"))
            self.left = True
        elif not isinstance(error, JobFailed):
            # The connections stay open: a peer that saw them end first would not know why. And the
            # process stays in this world: its job has failed, there is nothing to join again.
            self._control.report(failure_of(self.rank, error, self.position()))

    def _is_in(self) -> bool:
        # (A child that the script forks has a copy of this object, but is in no world.)
        return not self.left and not self._failed and os.getpid() == self._pid

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abandon(error)


def _user_tag(tag: int) -> int:
    if type(tag) is not int or tag < 0:
        raise UsageError(f"a tag is an integer from 0 to 2**62 - 1, not {tag!r}")
    return tag
