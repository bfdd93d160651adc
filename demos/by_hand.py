"""Step 5 of the course: three schedules written out by hand, as loops of receive, compute, send.

    python -m barepp.launch --world 4 demos/by_hand.py --schedule 1f1b

ends with

    loss 0.0000 after 460 steps; parameters sha256 …

That is the sha256 of demos/monolith.py. `forward` and `backward` below are what a rank does with a
microbatch; `naive`, `gpipe` and `one_f_one_b` decide only in which order. barepp.Stage holds the
layers of this rank, and keeps the graph of a microbatch from its forward to its backward.

    --print         print what each rank did in a step, as a list of actions: 1F0 is the forward of
                    stage 1 for microbatch 0. Another program could read and run such a list.
    --sends wait    let each send wait until the other rank has received. With 1f1b the ranks then
                    wait for each other in a circle: rank 2 sends an activation down while rank 3
                    sends a gradient up, and neither of them receives. The launcher proves the
                    deadlock, and ends the job. naive and gpipe have no such circle.

After this, look at the same list, and at what the engine of barepp makes of it for one rank:

    python -m barepp.plan --schedule 1f1b --stages 4 --microbatches 8 --explain 1

You can now say: a schedule is only the order in which each rank receives, computes and sends; a
send must not wait for its receiver, or the ranks can wait for each other forever.
"""

import dataclasses
import hashlib
from collections.abc import Callable

import barepp
import digits
import training
from flags import flag, run_demo

import torch
from torch import Tensor
from torch.nn import functional

ACKNOWLEDGED = 1  # the tag of the answer to a send that waits


@dataclasses.dataclass(frozen=True)
class Flags(training.Flags):
    """The flags of the other demos, and three more."""

    schedule: str = flag("1f1b", "naive, gpipe or 1f1b")
    sends: str = flag("start", "start: do not wait for the other rank to receive; wait: do")
    print: bool = flag(False, "print the list of actions that each rank did in a step")


WITHOUT = ("stages", "partition", "recompute", "autocast", "json", "trace", "verbose")


class Rank:
    """One rank of a pipeline, which holds the stage of the same number."""

    def __init__(self, world: barepp.World, flags: Flags) -> None:
        self.world, self.waits = world, flags.sends == "wait"
        self.rank, self.num_ranks = world.rank, world.world_size
        layers = barepp.mlp(flags.layers, flags.hidden)
        bounds = [len(layers) * rank // self.num_ranks for rank in range(self.num_ranks + 1)]
        mine = range(bounds[self.rank], bounds[self.rank + 1])
        self.stage = barepp.Stage(
            self.rank, mine, self.num_ranks, layers, functional.cross_entropy, seed=flags.seed
        )

    def begin_step(self, step: int, images: Tensor, labels: Tensor, num_microbatches: int) -> int:
        """Cut a batch into microbatches; return how many there are."""
        self.step, self.num_rows = step, len(labels)
        self.images = images.tensor_split(min(num_microbatches, len(labels)))  # [8, 64] each
        self.labels = labels.tensor_split(len(self.images))  # [8]
        self.loss = torch.zeros(())
        self.actions: list[str] = []
        return len(self.images)

    def forward(self, i: int) -> None:
        """Receive an activation from the rank before, compute, send to the rank behind."""
        x = self.images[i] if self.stage.is_first else self.recv(self.rank - 1)
        weight = len(self.labels[i]) / self.num_rows  # so that the losses add up to the mean
        y = self.stage.forward(i, x, step=self.step, target=self.labels[i], loss_weight=weight)
        if self.stage.is_last:
            self.loss += y  # the last stage returns the loss
        else:
            self.send(y, self.rank + 1)
        self.actions.append(f"{self.rank}F{i}")

    def backward(self, i: int) -> None:
        """Receive a gradient from the rank behind, compute, send to the rank before."""
        gradient = None if self.stage.is_last else self.recv(self.rank + 1)
        gradient = self.stage.backward(i, gradient)
        if not self.stage.is_first:
            self.send(gradient, self.rank - 1)
        self.actions.append(f"{self.rank}B{i}")

    def send(self, tensor: Tensor, dst: int) -> None:
        """Send; with --sends wait, return only when the other rank has received it."""
        self.world.send(tensor, dst)
        if self.waits:
            self.world.recv(dst, tag=ACKNOWLEDGED)

    def recv(self, src: int) -> Tensor:
        """Receive the next tensor of a neighbour."""
        tensor = self.world.recv(src)
        if self.waits:
            self.world.send(torch.empty(0), src, tag=ACKNOWLEDGED)
        return tensor


def naive(rank: Rank, m: int) -> None:
    """One microbatch after the other: down through all ranks, and back up."""
    for i in range(m):
        rank.forward(i)
        rank.backward(i)


def gpipe(rank: Rank, m: int) -> None:
    """All microbatches down, then all back up."""
    for i in range(m):
        rank.forward(i)
    for i in range(m):
        rank.backward(i)


def one_f_one_b(rank: Rank, m: int) -> None:
    """One forward, one backward in turn, as soon as the first microbatch has come back."""
    ahead = min(m, rank.num_ranks - rank.rank)  # forwards before the first backward
    for i in range(ahead):  # warm-up: the pipeline fills
        rank.forward(i)
    for i in range(ahead, m):  # steady state: one backward, one forward
        rank.backward(i - ahead)
        rank.forward(i)
    for i in range(m - ahead, m):  # cool-down: the pipeline drains
        rank.backward(i)


SCHEDULES: dict[str, Callable[[Rank, int], None]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
}


def parameters_sha256(rank: Rank) -> str:
    """Return on rank 0 the SHA-256 of all parameters, in layer order: each rank sends its own."""
    mine = torch.cat([parameter.detach().flatten() for parameter in rank.stage.parameters()])
    if rank.rank > 0:
        rank.world.send(mine, 0)
        return ""
    digest = hashlib.sha256()
    for src in range(rank.num_ranks):
        numbers = mine if src == 0 else rank.world.recv(src)
        digest.update(bytes(numbers.view(torch.uint8).tolist()))
    return digest.hexdigest()


def train(world: barepp.World, flags: Flags) -> tuple[str, object]:
    """Train the net on the digits; return on rank 0 the line that it prints."""
    for name, words in (("schedule", SCHEDULES), ("sends", ("start", "wait"))):
        if getattr(flags, name) not in words:
            raise barepp.UsageError(f"--{name} is one of {', '.join(words)}")
    if world.device.type != "cpu":
        raise barepp.UsageError(f"this demo computes on the CPU, not on {world.device}")
    training.check(flags, world)
    training_set, _ = digits.load()
    rank = Rank(world, flags)
    optimizer = torch.optim.Adam(rank.stage.parameters(), lr=flags.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / flags.steps)
    progress = training.Progress(flags.steps, silent=world.rank != 0)
    for step in range(flags.steps):
        images, labels = digits.batch(training_set, step, flags.batch, flags.seed)
        m = rank.begin_step(step, images, labels, flags.microbatches)
        optimizer.zero_grad()
        SCHEDULES[flags.schedule](rank, m)
        optimizer.step()
        decay.step()
        loss = world.broadcast(rank.loss, root=world.world_size - 1)  # the last stage has it
        progress.after_step(loss, len(labels))
    if flags.print:
        planned = barepp.make_schedule(flags.schedule, world.world_size, m).order[world.rank]
        same = "the same list as" if rank.actions == list(map(str, planned)) else "NOT the list of"
        print(f"{' '.join(rank.actions)}  ({same} barepp.make_schedule)")
    digest = parameters_sha256(rank)
    return f"loss {loss:.4f} after {flags.steps} steps; parameters sha256 {digest}", None


if __name__ == "__main__":
    run_demo(Flags(), __doc__, train, WITHOUT)
