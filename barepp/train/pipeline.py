"""Pipeline: a model cut into stages, one training step at a time, the same on every rank.

    with barepp.init() as world:
        pipe = barepp.Pipeline(world, barepp.mlp(), torch.nn.functional.cross_entropy)
        optimizer = torch.optim.Adam(pipe.parameters(), lr=1e-3)
        for images, labels in batches:
            pipe.zero_grad()
            loss = pipe.step(images, labels)
            optimizer.step()

What `step` does, with three stages on three ranks:

    rank 0                  rank 1                  rank 2
    number of rows ───────> ──────────────────────>                    1. how many microbatches
    cuts the inputs                                 cuts the targets   2. batch.py
    0F0 0F1 … 0B0 0B1       1F0 1F1 … 1B0 1B1       2F0 2B0 2F1 2B1    3. executor.py
                    <────────────────────── <────── loss               4. the same on every rank
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from barepp.errors import UsageError
from barepp.plan.partition import check_counts
from barepp.plan.partition import partition as cut
from barepp.program.actions import Kind
from barepp.program.lowering import Step, lower, placement
from barepp.schedules import Schedule, make_schedule, usual_stages
from barepp.trace.recorder import LOSS, NUM_ROWS, Recorder
from barepp.train.batch import (
    Batch,
    check_targets,
    join,
    microbatch_sizes,
    moved,
    rows_of_inputs,
    split,
)
from barepp.train.executor import Executor
from barepp.train.parameters import ModelPart, hash_parameters
from barepp.train.stage.boundary import Value
from barepp.train.stage.recompute import recompute_of_stages
from barepp.train.stage.seeding import Compute
from barepp.train.stage.stage import Stage
from transport.collectives import broadcast

if TYPE_CHECKING:
    from barepp.train.stage.layers import LayerBuilder, LossFunction
    from barepp.worker.world import World


class Pipeline(ModelPart):
    """A model in stages over the ranks of a world, trained as one process would train it.

    It computes on `world.device`: layers are built on the CPU and moved, data where it is needed.

    Args:
        world: this rank's world.
        layers: one zero-argument callable a layer, each building one `nn.Module`. Only those of
            this rank's stages are called, each under its own seed. (And one that can reach a
            parameter of this rank's: no parameter may be shared by two stages.)
        loss_fn: (output, target) -> a scalar, the mean over the rows.
        schedule: a name that `barepp.plan` knows.
        num_stages: into how many stages the layers are cut; by default one for each rank, and two
            for "interleaved_1f1b" and "zb_v". The schedule decides which rank holds which.
        num_microbatches: into how many microbatches a batch is cut; a batch with fewer rows makes
            as many microbatches as it has rows.
        partition: "uniform": as many layers in each stage; "balanced": so that the slowest stage is
            as fast as possible (balance.py); or the number of layers of each stage.
        seed: decides all initial weights and dropout masks, whatever the number of ranks.
        recompute: which microbatches keep only their stage's input and run its forward once more in
            backward: "off", "all" or "all_but_last"; or one of these for each stage.
        autocast: torch.bfloat16 or torch.float16: run forwards and losses under torch.autocast
            (autocast.py); float16 wants a `barepp.LossScaler` as well.
        sample: a batch (inputs, targets), such as the first one: with "balanced" the rank of the
            first stage needs it, to measure what the layers cost. The others wait meanwhile, some
            seconds for some dozens of layers. It changes no bit of the training.
        memory_limit: what "balanced" may use of a rank's memory, in bytes (layer_costs.py).

    Attributes:
        partition: how many layers each stage has.
        loss_scale: what the next step's backward starts from: 1, or what a `LossScaler` says.

    Raises:
        ScheduleError, PartitionError, UsageError: before anything is built or sent. (What is wrong
            with a sample or a memory limit, the rank of the first stage finds.)
    """

    def __init__(
        self,
        world: World,
        layers: Sequence[LayerBuilder],
        loss_fn: LossFunction,
        *,
        schedule: str = "1f1b",
        num_stages: int | None = None,
        num_microbatches: int = 8,
        partition: str | Sequence[int] = "uniform",
        seed: int = 0,
        recompute: str | Sequence[str] = "off",
        autocast: torch.dtype | None = None,
        sample: tuple[Value, Value] | None = None,
        memory_limit: int | None = None,
    ) -> None:
        if num_stages is None:
            num_stages = usual_stages(schedule, world.world_size)
        self.world = world
        self.schedule: Schedule = make_schedule(
            schedule, num_stages, num_microbatches, world.world_size
        )
        recomputed = recompute_of_stages(recompute, num_stages)
        if autocast is not None:
            from barepp.train.stage.autocast import check_autocast

            check_autocast(autocast, world.device)
        device = None if world.device.type == "cpu" else world.device
        self._compute = Compute(device, autocast, world.random_lock)
        self._holder = placement(self.schedule.order)  # which rank has which stage
        self._last = num_stages - 1
        self._loss_fn = loss_fn
        self.loss_scale = 1.0
        self.recorder = Recorder()
        if device is not None:
            from barepp.trace.device_recorder import recorder_for

            self.recorder = recorder_for(world)
        if partition == "balanced":
            check_counts(len(layers), num_stages)
            sizes = None
            if self._holder[0] == world.rank:  # it has the data
                from barepp.train.layer_profiler import balanced_sizes

                world.activity = ("profiling the layers",)
                sizes = balanced_sizes(
                    layers,
                    loss_fn,
                    sample,
                    self.schedule,
                    recomputed=[how != "off" for how in recomputed],
                    memory_limit=memory_limit,
                    seed=seed,
                    compute=self._compute,
                )
                world.activity = ()
            partition = self._from_rank(sizes, self._holder[0], "the partition").tolist()
        elif memory_limit is not None:
            raise UsageError('memory_limit is for partition="balanced"; no other heeds it')
        ranges = cut(len(layers), num_stages, partition)
        self.partition = [len(layer_range) for layer_range in ranges]
        self.stages: dict[int, Stage] = {
            index: Stage(
                index, ranges[index], num_stages, layers, loss_fn, seed=seed, compute=self._compute
            )
            for index in range(num_stages)
            if self._holder[index] == world.rank
        }
        self.layers = nn.ModuleDict()
        for stage in self.stages.values():
            self.layers.update(dict(stage.layers.items()))
        if device is not None and self._last in self.stages and isinstance(loss_fn, nn.Module):
            loss_fn.to(device)
        if num_stages > 1:
            from barepp.train.shared_parameters import check_no_sharing

            check_no_sharing(self.layers, ranges, layers, self._compute.randomness(seed))
        self._steps = 0
        self._broken = False
        self._executor = Executor(world, self.stages, num_stages, recomputed)
        self._programs: dict[tuple[int, bool], Sequence[Step]] = {}  # each is made once

    # -- one step ---------------------------------------------------------------------------------

    def step(self, inputs: Value | None, targets: Value | None) -> torch.Tensor:
        """Run forward and backward of one batch; gradients are added to `.grad`.

        Every rank calls it. `inputs` (rows first; a tensor, or a tuple or dict of tensors) is used
        on the rank of the first stage, `targets` on that of the last; elsewhere they may be None.
        Blocks until this rank's part is done, and returns the mean loss over all rows,
        0-dimensional, on every rank.

        Raises:
            UsageError: data is missing where it is needed, has no rows, or rows that do not match;
                or an earlier step has failed on this rank of several.
            JobFailed: another rank failed.
        """
        if self._broken:
            raise UsageError("a step of this pipeline failed: messages of it may still be about")
        self._broken = self.world.world_size > 1  # until this step has ended well
        self.recorder.schedule = self.schedule
        self.recorder.begin_step(self._steps)
        try:
            batch = self._batch(inputs, targets, with_targets=True)
            self._executor.train(self._program(batch, training=True), batch, self.recorder)
            loss = self._total_loss()
        except BaseException:
            for stage in self.stages.values():
                stage.clear()
            raise
        self.recorder.end_step()
        batch.let_go()
        self._broken = False
        self._steps += 1
        self.world.steps += 1
        return loss

    def trace(self) -> None:
        """Let each rank's recorder keep spans from now on; collective, see `barepp.trace`."""
        from barepp.trace.collect import start_trace

        start_trace(self.world, self.recorder, self.parameters())

    def forward(self, inputs: Value | None) -> Value | None:
        """Return the model's output for `inputs` on the rank of the last stage, None elsewhere.

        Every rank calls it. Nothing is kept for a backward. Layers are in the mode that `train()`
        or `eval()` has set.
        """
        return self._output(self._batch(inputs, None, with_targets=False))

    def _output(self, batch: Batch) -> Value | None:
        self._executor.infer(self._program(batch, training=False), batch)
        batch.let_go()
        parts = [self._executor.outputs[index] for index in sorted(self._executor.outputs)]
        return join(parts) if parts else None

    def evaluate(self, inputs: Value | None, targets: Value | None) -> torch.Tensor:
        """Return the mean loss over all rows on every rank, in `eval()` mode, without gradients."""
        batch = self._batch(inputs, targets, with_targets=True)
        # Layer by layer: a script may have put a single one, a frozen BatchNorm say, into eval().
        modules = list(self.layers.modules())
        modes = [module.training for module in modules]
        self.eval()
        try:
            output = self._output(batch)
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
        loss = None
        if self._last in self.stages:
            with self._compute.within(torch.no_grad()):
                assert batch.targets is not None
                loss = self._loss_fn(output, join(batch.targets)).detach().reshape(())  # []
        return self._from_rank(loss, self.last_rank, LOSS)

    def _batch(self, inputs: Value | None, targets: Value | None, *, with_targets: bool) -> Batch:
        """Agree on the number of rows (the first rank's word) and cut this rank's data."""
        rows = torch.tensor([rows_of_inputs(inputs)]) if 0 in self.stages else None
        count = int(self._from_rank(rows, self._holder[0], NUM_ROWS))
        sizes = microbatch_sizes(count, self.schedule.num_microbatches)
        if self._last in self.stages and with_targets:
            check_targets(targets, count)
        copied: list[torch.cuda.Event] = []

        def cut_up(value: Value | None, stage: int) -> Sequence[Value] | None:
            if value is None or stage not in self.stages:
                return None
            return split(moved(value, self.world.device, copied), sizes)

        return Batch(
            self._steps,
            [size / count for size in sizes],
            cut_up(inputs, 0),
            cut_up(targets, self._last),
            self.loss_scale,
            copied,
        )

    def _total_loss(self) -> torch.Tensor:
        """Add the microbatches' weighted losses up, in microbatch order, and tell every rank."""
        total = None
        if self._last in self.stages:
            losses = self._executor.losses
            total = sum((losses[index] for index in sorted(losses)), torch.zeros(()))
        return self._from_rank(total, self.last_rank, LOSS)

    def _program(self, batch: Batch, *, training: bool) -> Sequence[Step]:
        """Return this rank's actions and their messages; without `training` its forwards alone."""
        key = (len(batch.weights), training)
        if key not in self._programs:
            schedule = self.schedule
            order = make_schedule(
                schedule.name, schedule.num_stages, len(batch.weights), schedule.num_ranks
            ).order
            if not training:
                order = [[action for action in row if action.kind is Kind.F] for row in order]
            self._programs[key] = lower(order, schedule.num_stages)[self.world.rank]
        return self._programs[key]

    def _from_rank(self, tensor: torch.Tensor | None, root: int, what: str) -> torch.Tensor:
        """Return the root's tensor on every rank; the others wait for `what`, which is recorded."""
        world, recorder = self.world, self.recorder
        if world.world_size == 1:
            assert tensor is not None
            return tensor
        world.activity = ("waiting for" if tensor is None else "sharing", what)
        asked = recorder.clock.last()
        shared = broadcast(world.transport, tensor, root)
        ended = recorder.clock.mark()
        world.activity = ()
        if root == world.rank:
            recorder.add_flush(f"sharing {what}", asked, ended)
        else:
            recorder.add_wait(what, root, asked, ended)
        assert isinstance(shared, torch.Tensor)
        return shared

    # -- the model --------------------------------------------------------------------------------

    @property
    def peak_in_flight(self) -> int:
        """The most stage forwards that were kept for their backward at one time."""
        return self._executor.peak_in_flight

    @property
    def last_rank(self) -> int:
        """The rank of the last stage, which gets the targets and has the output: not always p-1."""
        return self._holder[self._last]

    def parameters_sha256(self) -> str:
        """Return the SHA-256 of all parameters; collective, the same on every rank.

        Over their float32 little-endian bytes, in layer order.
        """
        digest = hash_parameters(self.world, self._holder, self.stages)
        packed = None if digest is None else torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        return bytes(self._from_rank(packed, 0, "the parameters' hash").tolist()).hex()
