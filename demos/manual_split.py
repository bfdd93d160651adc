"""Step 2 of the course: the net cut in two by hand, still in one process.

    python demos/manual_split.py

ends with

    34 of 34 gradients are those of the whole net, bit for bit

What has to be handed over, and nothing else (barepp/train/stage/boundary.py does the same between
processes):

    front half                              back half
    images → 8 layers → output ──[1]──→ received → 8 layers and the head → loss
                           │                │                               │
                          [4] ←────[3]── received.grad ←────[2] backward ───┘

You can now say: between two stages only numbers cross: an activation forwards, and its gradient
backwards.
"""

import digits
import monolith

import torch
from torch import nn
from torch.nn import functional

LAYERS, HIDDEN, SEED, ROWS, CUT = 16, 128, 0, 8, 8


def whole(images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of the whole net, computed as anyone would."""
    model = monolith.build(LAYERS, HIDDEN, SEED)
    functional.cross_entropy(model(images), labels).backward()
    return gradients(model)


def split(images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of the same net, computed in two halves."""
    layers = list(monolith.build(LAYERS, HIDDEN, SEED))
    front, back = nn.Sequential(*layers[:CUT]), nn.Sequential(*layers[CUT:])

    output = front(images)  # [8, 128]
    # [1] Why detach? Behind `output` hangs the graph of the front half. The back half may be in
    #     another process, where that graph is not: only the numbers cross.
    received = output.detach()  # [8, 128]
    #     Why requires_grad here? To autograd these numbers are now plain data, and data gets no
    #     gradient. This asks for one, as if they were a weight.
    received.requires_grad_()
    loss = functional.cross_entropy(back(received), labels)  # []

    # [2] Goes back to `received` and stops there: the graph of the back half begins with it.
    loss.backward()
    # [3] How the loss changes with what the front half gave: all that it needs to know.
    gradient = received.grad  # [8, 128]
    # [4] Why backward with an argument? A loss is one number and starts from 1; `output` is many,
    #     and the gradient says how much each one matters.
    output.backward(gradient)
    print(f"handed over: {list(received.shape)} forwards, {list(gradient.shape)} backwards")
    return gradients(front) + gradients(back)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return the gradient of each parameter, in layer order."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    """Compare the two."""
    torch.set_num_threads(1)  # as in a pipeline: more threads add in another order
    training_set, _ = digits.load()
    images, labels = digits.batch(training_set, 0, ROWS, SEED)  # [8, 64], [8]
    pairs = list(zip(whole(images, labels), split(images, labels), strict=True))
    equal = sum(torch.equal(one, other) for one, other in pairs)
    print(f"{equal} of {len(pairs)} gradients are those of the whole net, bit for bit")


if __name__ == "__main__":
    main()
