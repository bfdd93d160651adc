"""The recorder of a rank on a GPU: takes note of moments, and of times once the device was there.

    the rank     begin_step  add_actions …  end_step │ begin_step  add_actions …  end_step │
    the device        ────── works on that step ──────────│
    settled                                                     its sums and spans ────────^

1. A step never waits for the device: it puts two events an action into the stream (device_clock.py)
   and keeps what it wants to have recorded. That is recorded at the end of a later step, when the
   device has been there, or when somebody asks (`settle`).
2. An action waits from the end of the one before to its start: while the device had nothing to do,
   for a message or for the rank's Python, which gives it the work.
3. Sends and receives are copies in streams of the transport's own, beside the computing: they are
   spans of their own (`copies`), and no action's time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from barepp.program.lowering import Step
from barepp.trace.clock_sync import Reading
from barepp.trace.device_clock import DeviceClock, Event, clock_of
from barepp.trace.recorder import KEPT_COPIES, KEPT_STEPS, Note, Recorder, Times, TracedStep

if TYPE_CHECKING:
    from barepp.worker.world import World
    from transport.device import Copy

KEPT_MOMENTS: Final = 128 * KEPT_STEPS  # settled ones: a span may end long after it began
MOST_DEFERRED: Final = 1000  # without a step, in a long evaluation say


def recorder_for(world: World) -> Recorder:
    """Return the recorder for the device that a rank computes on."""
    clock = clock_of(world.device)
    return DeviceRecorder(clock) if isinstance(clock, DeviceClock) else Recorder()


def _is_over(event: Event) -> bool:
    return event.query()


class DeviceRecorder(Recorder):
    """A recorder whose moments are marks of a `DeviceClock`; its times are that clock's."""

    times_arrivals: ClassVar[bool] = False

    def __init__(self, clock: DeviceClock) -> None:
        super().__init__(clock=clock)
        self._device = clock
        # What is to be kept when the device has come to a moment; None: nothing, but settle it.
        self._deferred: deque[tuple[int, TracedStep | Note | None]] = deque()
        self._when: dict[int, int] = {}  # moments that are settled
        self._copies: deque[Copy] = deque(maxlen=KEPT_COPIES)  # any thread appends

    def add_actions(
        self, program: Sequence[Step], times: Sequence[Times], arrivals: Sequence[int] = ()
    ) -> None:
        """Add what a program's actions took, to be known later."""
        super().add_actions(program, times, arrivals)
        if self._now is None:  # an evaluation: its moments are not kept, but are settled
            self._defer(self._device.last(), None)

    def end_step(self, at: int | None = None) -> None:
        """End a step at this moment, and record those that the device has done by now."""
        super().end_step(at)
        self._settle_passed()

    def _keep(self, step: TracedStep) -> None:
        self._defer(self._device.last(), step)  # none of its moments is later

    def add_outside(self, name: str, start: int, end: int) -> None:
        """Keep a span between steps."""
        self._defer(end, Note(name, None, start, end))

    def add_copy(self, copy: Copy) -> None:
        """Take note of a copy in a stream of the transport's; any thread may call."""
        self._copies.append(copy)

    def settle(self) -> None:
        """Record all; blocks until the device has come so far."""
        self._settle(self._deferred[-1][0] if self._deferred else None)

    def compare_device(self) -> list[Reading]:
        """Return how far this clock is ahead of the host's; blocks until the device is idle."""
        self.settle()
        return [self._device.compare()]

    def _defer(self, until: int, what: TracedStep | Note | None) -> None:
        # Moments come in order, but what was noted before may end later: an optimizer's step, say,
        # that began before another one.
        until = max(until, self._deferred[-1][0]) if self._deferred else until
        self._deferred.append((until, what))
        if len(self._deferred) % MOST_DEFERRED == 0:
            self._settle_passed()

    def _settle_passed(self) -> None:
        """Record what the device has done; never waits."""
        passed = None
        for until, _ in self._deferred:
            if not self._device.passed(until):
                break
            passed = until
        self._settle(passed)

    def _settle(self, until: int | None) -> None:
        """Record what ends up to this moment; blocks until the device has come there."""
        if until is not None:
            self._device.reach(until)  # which the copies that belong to it were before
        while self._copies and _is_over((copy := self._copies[0]).ended):
            self._copies.popleft()  # (or the next one, if it was just pushed out at the other end)
            at = self._device.at(copy.began), self._device.at(copy.ended)
            self.copies.append((copy.direction, copy.nbytes, *at))
        if until is None:
            return
        self._when.update(self._device.settle(until))
        while self._deferred and self._deferred[0][0] <= until:
            self._record(self._deferred.popleft()[1])
        while len(self._when) > KEPT_MOMENTS:
            del self._when[next(iter(self._when))]

    def _record(self, what: TracedStep | Note | None) -> None:
        """Keep a step or a span, now that its moments are known."""
        when = self._when
        if isinstance(what, Note):
            if what.start in when:
                self.outside.append(what._replace(start=when[what.start], end=when[what.end]))
        elif what is not None:
            what.start, what.end = when[what.start], when[what.end]
            what.times = [(when[a], when[s], when[e], when[g]) for a, s, e, g in what.times]
            what.notes = [n._replace(start=when[n.start], end=when[n.end]) for n in what.notes]
            # Of a message that comes while the rank's Python is far ahead nobody knows when the
            # device had it, but for this: when the action started it was there.
            what.arrivals = [started for _, started, _, _ in what.times]
            super()._keep(what)
