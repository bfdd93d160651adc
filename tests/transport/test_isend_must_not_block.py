"""Why isend may not wait for the receiver: the same 1F1B with sends that do wait is a deadlock.

Two neighbours in 1F1B's steady state, each with a send to make before its next receive:

    rank 0:  ... send activation 2 to rank 1, then take gradient 0 ...
    rank 1:  ... send gradient 0 to rank 0,   then take activation 2 ...

Over sockets the kernel's buffers hide it until the tensors outgrow them; over inproc it shows.
"""

from __future__ import annotations

import pytest
import torch
from transport_worlds import on_all_ranks

from barepp.train.models import mlp
from barepp.train.pipeline import Pipeline
from barepp.worker.world import World
from transport.errors import WaitTimeout
from transport.inproc import InprocHub, InprocTransport
from transport.message.work import Receive, Work

ACK_TAG = -3
PATIENCE_S = 1.0  # a send that is not received for so long never will be: nobody computes here


class AcknowledgedWork(Receive):
    """A receive that tells its sender once the message has been taken."""

    def __init__(self, inner: Work, transport: InprocTransport, src: int) -> None:
        super().__init__(transport, src, inner.tag, None, None)
        self._inner, self._sender = inner, (transport, src)

    def wait(self, timeout=None):
        message = self._inner.wait(timeout)
        transport, src = self._sender
        InprocTransport.isend(transport, torch.empty(0), src, ACK_TAG)
        return message


class SynchronousTransport(InprocTransport):
    """Sends return only when the receiver has taken the message, as MPI_Ssend may."""

    def isend(self, message, dst, tag=0):
        work = super().isend(message, dst, tag)
        super().irecv(dst, ACK_TAG).wait(PATIENCE_S)
        return work

    def irecv(self, src, tag=0, *, into=None, expect=None):
        return AcknowledgedWork(super().irecv(src, tag, into=into, expect=expect), self, src)


def train_one_step(transport_class: type[InprocTransport], schedule: str) -> list[float]:
    hub = InprocHub(2)
    images, labels = torch.randn(8, 64), torch.randint(0, 10, (8,))

    def step(transport) -> float:
        pipe = Pipeline(
            World(transport),
            mlp(3, 16),
            torch.nn.functional.cross_entropy,
            schedule=schedule,
            num_microbatches=4,
        )
        return float(pipe.step(images, labels))

    return on_all_ranks([transport_class(hub, rank) for rank in range(2)], step)


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b"])
def test_every_schedule_runs_when_isend_does_not_wait(schedule):
    first, second = train_one_step(InprocTransport, schedule)
    assert first == second


def test_naive_runs_even_when_sends_wait():
    first, second = train_one_step(SynchronousTransport, "naive")
    assert first == second


def test_1f1b_deadlocks_when_sends_wait():
    with pytest.raises(WaitTimeout):
        train_one_step(SynchronousTransport, "1f1b")
