"""Follows a pipeline that trains: its progress, its results, the same bits as one process."""

import barepp
import monolith
import training

import torch


class Follower(training.Progress):
    """Follows the training of a pipeline: prints its progress, and collects its results."""

    def __init__(self, world: barepp.World, pipe: barepp.Pipeline, flags: training.Flags) -> None:
        super().__init__(flags.steps, silent=world.rank != 0)
        self._world, self._pipe, self._flags = world, pipe, flags
        self._compared_steps = min(training.COMPARED_STEPS, flags.steps)
        self._early_sha256 = ""
        if flags.trace is not None:
            pipe.trace()

    def after_step(self, loss: torch.Tensor, num_images: int) -> None:
        """Take the result of the next step; every rank calls it."""
        super().after_step(loss, num_images)
        if len(self.losses) == self._compared_steps:
            self._early_sha256 = self._pipe.parameters_sha256()

    def results(self, test_accuracy: float) -> training.Results:
        """Return the results, the same on every rank; every rank calls it."""
        pipe, flags = self._pipe, self._flags
        return training.results_of(
            self._world,
            flags,
            pipe.recorder,
            pipe.peak_in_flight,
            schedule=pipe.schedule.name,
            stages=pipe.schedule.num_stages,
            partition=pipe.partition,
            losses=self.losses,
            test_accuracy=test_accuracy,
            parameters_sha256=pipe.parameters_sha256(),
            same_bits=self._same_bits(),
            bubble_predicted=training.predicted_bubble(pipe.schedule, pipe.partition, flags),
        )

    def _same_bits(self) -> bool | None:
        """Repeat the first steps in one process, on rank 0; None where that has no meaning."""
        said = torch.tensor(self._repeated()) if self._world.rank == 0 else None  # the others wait
        return {1: True, 0: False, -1: None}[int(self._world.broadcast(said, root=0))]

    def _repeated(self) -> int:
        in_float32 = self._flags.autocast == "off" and self._world.device.type == "cpu"
        if not in_float32 or torch.get_num_threads() > 1:
            return -1
        alone = monolith.parameters_after(self._compared_steps, self._flags)
        return int(alone == self._early_sha256)
