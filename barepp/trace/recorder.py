"""What one rank measures of its own steps: sums always, every span when tracing is on.

A step's time on one rank is split where it happens, so that waiting never counts as anything else:

    computing   inside an action: torch's forward or backward, and the stage's care around it
    waiting     blocked on what another rank has to send: the bubble, and time for a core
    sending     handing messages to the transport (isend), and waiting at the end until they left
    own         the rest: posting receives, splitting, bookkeeping

An action costs four readings of the clock and a tuple, with and without tracing. At the step's end
the tuples become sums (`step_times`); tracing keeps them too, and asks when each message arrived.
On a GPU the clock is the device's, and what it says is known later (device_recorder.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, TypeAlias

from barepp.program.actions import Kind
from barepp.program.lowering import Step
from barepp.trace.device_clock import HOST_CLOCK, Clock

if TYPE_CHECKING:
    from barepp.schedules import Schedule
    from barepp.trace.clock_sync import Reading

KEPT_STEPS: Final = 1000  # older ones are forgotten, so that a long run stays small
KEPT_COPIES: Final = 64 * KEPT_STEPS

# What a rank waits for; the first two are the pipeline's own messages, the others go once a step.
ACTIVATIONS: Final = "activations"
GRADIENTS: Final = "gradients"
NUM_ROWS: Final = "the number of rows"
LOSS: Final = "the loss"
AWAITED: Final = (ACTIVATIONS, GRADIENTS, NUM_ROWS, LOSS)

WAITING_FOR: Final = "waiting for "

# When an action's input was asked for, when the action started and ended, and when its result had
# been handed on: nanoseconds of `time.perf_counter_ns`, or moments of another clock.
Times: TypeAlias = tuple[int, int, int, int]

# A copy of the transport's on a GPU: "send" or "receive", bytes, start and end.
CopyTimes: TypeAlias = tuple[str, int, int, int]


class StepTimes(NamedTuple):
    """One step on one rank, in nanoseconds."""

    step: int
    compute: int
    waits: dict[tuple[int, str], int]  # (for which rank, for what)
    send: int  # in isend
    flush: int  # at the end, until the sent messages have left
    actions: int  # how many


class Note(NamedTuple):
    """A span that is no action; `peer` is the rank that it is about, or None."""

    name: str
    peer: int | None
    start: int
    end: int


def step_times(
    took: int, program: Sequence[Step], times: Sequence[Times], notes: Iterable[Note]
) -> StepTimes:
    """Return the sums of a step from the times of its actions, and its notes."""
    compute = send = flush = 0
    of_activations: dict[int, int] = {}  # by the rank that was waited for
    of_gradients: dict[int, int] = {}
    for (action, source, to), (asked, started, ended, gave) in zip(program, times, strict=True):
        compute += ended - started
        if to is not None:
            send += gave - ended
        if source is not None:
            those = of_activations if action[1] is Kind.F else of_gradients
            those[source] = those.get(source, 0) + started - asked
    waits = {(source, ACTIVATIONS): waited for source, waited in of_activations.items()}
    for source, waited in of_gradients.items():
        waits[source, GRADIENTS] = waited
    for name, peer, start, end in notes:
        if peer is None:
            flush += end - start
        else:
            reason = (peer, name.removeprefix(WAITING_FOR))
            waits[reason] = waits.get(reason, 0) + end - start
    return StepTimes(took, compute, waits, send, flush, len(program))


@dataclasses.dataclass
class TracedStep:
    """All that a rank recorded of one step, as it was when it happened."""

    number: int
    start: int
    end: int = 0
    program: Sequence[Step] = ()
    times: Sequence[Times] = ()
    arrivals: Sequence[int] = ()  # when each action's message was here; 0 where none came
    notes: list[Note] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Recorder:
    """Collects one rank's times, in nanoseconds of its clock, here `time.perf_counter_ns`.

    `steps`, and when tracing `traced`, are the last `KEPT_STEPS` steps; `outside` are the spans
    between steps, such as the optimizer's. `Pipeline.trace` turns tracing on. What a device has
    not come to yet is missing there until `settle`.
    """

    times_arrivals: ClassVar[bool] = True  # whether it wants to know when each message was here

    tracing: bool = False
    schedule: Schedule | None = None  # what the traced steps run
    readings: list[list[Reading]] = dataclasses.field(default_factory=list)  # of all clocks, rank 0
    steps: deque[StepTimes] = dataclasses.field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    traced: deque[TracedStep] = dataclasses.field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    outside: deque[Note] = dataclasses.field(default_factory=lambda: deque(maxlen=4 * KEPT_STEPS))
    clock: Clock = HOST_CLOCK
    copies: deque[CopyTimes] = dataclasses.field(default_factory=lambda: deque(maxlen=KEPT_COPIES))
    device_readings: list[Reading] = dataclasses.field(default_factory=list)  # beside the host's
    _now: TracedStep | None = None  # None between steps

    def begin_step(self, number: int = 0, at: int | None = None) -> None:
        """Start a step's clock, now unless it is said when."""
        self._now = TracedStep(number, self.clock.mark() if at is None else at)

    def add_actions(
        self, program: Sequence[Step], times: Sequence[Times], arrivals: Sequence[int] = ()
    ) -> None:
        """Add what a program's actions took to the current step."""
        if self._now is not None:
            assert not self._now.times, "a step runs one program"
            self._now.program, self._now.times, self._now.arrivals = program, times, arrivals

    def add_wait(self, what: str, peer: int, asked: int, ended: int) -> None:
        """Add to the current step a wait for something that is not an action's input."""
        if self._now is not None:
            self._now.notes.append(Note(WAITING_FOR + what, peer, asked, ended))

    def add_flush(self, name: str, asked: int, ended: int) -> None:
        """Add to the current step the time until what was sent had left."""
        if self._now is not None:
            self._now.notes.append(Note(name, None, asked, ended))

    def end_step(self, at: int | None = None) -> None:
        """Stop the clock and take the step's sums."""
        now = self._now
        assert now is not None, "no step has begun"
        now.end = self.clock.mark() if at is None else at
        # What is waited for before the next step (by `evaluate`, say) is not this one's.
        self._now = None
        self._keep(now)

    def _keep(self, step: TracedStep) -> None:
        """Keep the sums of a step whose times are known; all of it when tracing."""
        self.steps.append(step_times(step.end - step.start, step.program, step.times, step.notes))
        if self.tracing:
            step.arrivals = step.arrivals or [0] * len(step.times)
            self.traced.append(step)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the block's time under a name of your own, if tracing is on: outside of steps."""
        if not self.tracing:
            yield
            return
        start = self.clock.mark()
        try:
            yield
        finally:
            self.add_outside(name, start, self.clock.mark())

    def add_outside(self, name: str, start: int, end: int) -> None:
        """Keep a span between steps."""
        self.outside.append(Note(name, None, start, end))

    def settle(self) -> None:
        """Block until all that was recorded is known: here it is at once."""

    def compare_device(self) -> list[Reading]:
        """Return how far the clock is ahead of the host's; nothing where it is the host's."""
        return []
