"""Runs one rank's program: for every action take what it needs, compute, give what it made.

    for 1F0 on a rank in the middle:   take <── irecv, posted when the step began
                                       compute   Stage.forward
                                       give  ──> isend, waited for when the step ends

This is the only file in which a stage's work meets a transport's messages.

1. Receives are posted before the first action, so bytes move while the rank computes.
2. No send is waited for inside a step: a rank that waited there for its neighbour to receive could
   wait for a neighbour that waits for it (1F1B does exactly that; see transport/README.md).
3. What is measured is split where it happens (recorder.py): waiting is never computing.
4. A test that lets a rank fail wraps `compute` and `give`; nothing else here knows of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import torch

from barepp.program.actions import Action, Kind
from barepp.program.lowering import Step, activation_tag, gradient_tag
from barepp.trace.recorder import Recorder, Times
from barepp.train.batch import Batch
from barepp.train.messages import (
    copied,
    pack_activation,
    pack_gradient,
    unpack_activation,
    unpack_gradient,
)
from barepp.train.stage.boundary import Value, tensors
from barepp.train.stage.recompute import is_recomputed
from barepp.train.stage.stage import Stage
from transport.errors import DeviceError, JobFailed, is_from_cuda
from transport.message.work import Receive, Work

if TYPE_CHECKING:
    from barepp.worker.world import World
    from transport.message.specs import Message

# The pipeline's tags are negative, below those of the collectives: a user's can never meet them.
_FIRST_TAG = -16

Result: TypeAlias = "Message | None"
Compute: TypeAlias = "Callable[[Action, Result], Result]"
Give: TypeAlias = "Callable[[Step, Result], None]"


class Executor:
    """Executes programs on this rank's stages.

    Attributes:
        peak_in_flight: the most stage forwards at one time whose backward (W, where it is split)
            had not run yet.
        losses: the weighted loss of each microbatch of the last step (last stage only).
        outputs: the output of each microbatch of the last forward without gradients (likewise).
    """

    def __init__(
        self, world: World, stages: Mapping[int, Stage], num_stages: int, recompute: Sequence[str]
    ) -> None:
        self._world = world
        self._stages = stages
        self._last = num_stages - 1
        self._recompute = recompute  # for each stage: which microbatches
        self._batch = Batch(0, (), None, None)
        self._split: set[tuple[int, int]] = set()  # (stage, microbatch) of each I
        self.peak_in_flight = 0
        # From stage to stage on one rank, by (stage it is for, is it an activation, microbatch).
        self._local: dict[tuple[int, bool, int], Result] = {}
        self._sends: list[Work] = []
        self.losses: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, Value] = {}

    def train(self, program: Sequence[Step], batch: Batch, recorder: Recorder) -> None:
        """Run a step's forwards and backwards; gradients end up in `.grad`.

        What was computed and waited for is added to the recorder's current step.
        """
        self.losses = {}
        actions = [step.action for step in program]
        self._split = {(a.stage, a.microbatch) for a in actions if a.kind is Kind.I}
        methods: dict[Kind, Compute] = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._backward,
            Kind.W: self._backward_weights,
        }

        def compute(action: Action, taken: Result) -> Result:
            return methods[action.kind](action, taken)

        hook = self._world.fault_hook
        if hook is None:
            self._run(program, batch, compute, self._give, recorder)
        else:
            self._run(
                program, batch, *hook.around(compute, self._give, program, batch.step), recorder
            )

    def infer(self, program: Sequence[Step], batch: Batch) -> None:
        """Run forwards only, without gradients; the last stage's results go to `outputs`."""
        self.outputs = {}
        self._run(program, batch, self._infer, self._give, Recorder())

    def _run(
        self,
        program: Sequence[Step],
        batch: Batch,
        compute: Compute,
        give: Give,
        recorder: Recorder,
    ) -> None:
        world, mark, last = self._world, recorder.clock.mark, recorder.clock.last
        timed = recorder.tracing and recorder.times_arrivals
        self._batch = batch
        self._local.clear()
        self._sends = []
        for stage in self._stages.values():
            stage.invalidate_cache()
        times: list[Times] = []
        share = len(batch.weights) / max(1, len(program))  # of a microbatch, that an action is
        with self._errors_say_where():
            world.activity = ("posting its receives",)
            receives = [self._post(step, timed=timed) for step in program]
            for step, receive in zip(program, receives, strict=True):
                action = step.action
                world.activity = ("waiting for the input of", action)
                asked = last()
                taken = receive.wait() if receive is not None else self._take(action)
                world.activity = ("computing", action)
                started = mark()
                made = compute(action, taken)
                ended = mark()
                give(step, made)
                times.append((asked, started, ended, last()))
                world.microbatches += share
            world.activity = ("waiting for its sends",)
            asked = last()
            for send in self._sends:
                send.wait()
            recorder.add_flush("waiting for its sends", asked, mark())
            world.activity = ()
        arrivals = [getattr(receive, "arrived_ns", 0) for receive in receives] if timed else ()
        recorder.add_actions(program, times, arrivals)

    @contextlib.contextmanager
    def _errors_say_where(self) -> Iterator[None]:
        """Add to what another rank or CUDA reports what this rank was doing."""
        world = self._world
        try:
            yield
        except JobFailed as error:
            raise JobFailed(error.failure, world.position()) from None
        except RuntimeError as error:
            if is_from_cuda(error):
                raise DeviceError.of(error, world.rank, world.position()) from error
            raise

    # -- messages ---------------------------------------------------------------------------------

    def _post(self, step: Step, *, timed: bool) -> Work | None:
        if step.receive_from is None:
            return None
        transport, tag = self._world.transport, _input_tag(step.action)
        if not timed:
            return transport.irecv(step.receive_from, tag)
        receive = _TimedReceive(transport, step.receive_from, tag, None, None)
        transport.post_receive(receive)
        return receive

    def _take(self, action: Action) -> Result:
        stage, kind, microbatch = action
        return self._local.pop((stage, kind is Kind.F, microbatch), None)

    def _give(self, step: Step, made: Result) -> None:
        stage, kind, microbatch = step.action
        if made is None:
            return
        if step.send_to is not None:
            tag = _output_tag(step.action)
            self._sends.append(self._world.transport.isend(made, step.send_to, tag))
        elif kind is Kind.F:
            # The next stage on this rank may write to what it is given, and this stage's backward
            # may need it: a copy, as a transport would make.
            self._local[stage + 1, True, microbatch] = copied(made)
        else:
            self._local[stage - 1, False, microbatch] = made

    # -- actions: each takes a message and makes one ----------------------------------------------

    def _forward(self, action: Action, taken: Result) -> Result:
        stage, _, microbatch = action
        batch = self._batch
        value, wanted = self._input(action, taken)
        made = self._stages[stage].forward(  # [rows, ...], on the last stage []
            microbatch,
            value,
            step=batch.step,
            target=batch.targets[microbatch] if stage == self._last and batch.targets else None,
            loss_weight=batch.weights[microbatch],
            loss_scale=batch.loss_scale,
            input_requires_grad=wanted,
            split=(stage, microbatch) in self._split,
            recompute=is_recomputed(self._recompute[stage], microbatch, len(batch.weights)),
        )
        in_flight = sum([held.in_flight for held in self._stages.values()])
        self.peak_in_flight = max(self.peak_in_flight, in_flight)
        if stage < self._last:
            return pack_activation(made, self._stages[stage].output_requires_grad(microbatch))
        assert isinstance(made, torch.Tensor)
        self.losses[microbatch] = made
        return None

    def _backward(self, action: Action, taken: Result) -> Result:
        stage = self._stages[action.stage]
        backward = stage.backward if action.kind is Kind.B else stage.backward_inputs
        made = backward(action.microbatch, unpack_gradient(taken))  # as the stage's input
        return None if action.stage == 0 else pack_gradient(made)

    def _backward_weights(self, action: Action, _: Result) -> Result:
        self._stages[action.stage].backward_weights(action.microbatch)
        return None

    def _infer(self, action: Action, taken: Result) -> Result:
        stage, _, microbatch = action
        value, _ = self._input(action, taken)
        made = self._stages[stage].evaluate(value, microbatch=microbatch, step=self._batch.step)
        if stage < self._last:
            return pack_activation(made, [True] * len(tensors(made)))
        self.outputs[microbatch] = made
        return None

    def _input(self, action: Action, taken: Result) -> tuple[Value, Sequence[bool] | None]:
        if action.stage == 0:
            assert self._batch.inputs is not None
            return self._batch.inputs[action.microbatch], None
        assert taken is not None
        return unpack_activation(taken)


class _TimedReceive(Receive):
    """A receive that notes when its message was here, or was asked for if it was here before."""

    __slots__ = ("arrived_ns",)

    def complete(self, result: Message | None = None) -> None:
        self.arrived_ns = time.perf_counter_ns()
        super().complete(result)


@lru_cache(maxsize=4096)  # the same actions in every step
def _input_tag(action: Action) -> int:
    """Return the tag under which an action's input comes: an activation or a gradient."""
    stage, kind, microbatch = action
    named = activation_tag if kind is Kind.F else gradient_tag
    return _FIRST_TAG - named(stage, microbatch)


@lru_cache(maxsize=4096)
def _output_tag(action: Action) -> int:
    """Return the tag under which the next stage (the previous one, backwards) awaits the result."""
    stage, kind, microbatch = action
    if kind is Kind.F:
        return _FIRST_TAG - activation_tag(stage + 1, microbatch)
    return _FIRST_TAG - gradient_tag(stage - 1, microbatch)
