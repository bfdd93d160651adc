"""`barepp.init` and `World` in a process that is a world of its own, and among threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from jobs import LIMIT_S, ROOT, nothing_left
from transport_worlds import SOON_S, start, world

import barepp
from barepp.worker.world import World
from transport.base import TAG_LIMIT
from transport.errors import (
    Failure,
    InvalidArgument,
    JobFailed,
    PeerLost,
    TransportClosed,
    WaitTimeout,
)


class NotedControl:
    """A launcher that only takes note."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def barrier(self, timeout: float | None = None, *, last: bool = False) -> None:
        self.calls.append("last barrier" if last else "barrier")

    def report(self, failure: Failure) -> None:
        self.calls.append(failure)

    def leave(self) -> None:
        self.calls.append("goodbye")


def test_by_itself_a_process_is_a_world_of_one() -> None:
    with nothing_left(), barepp.init() as alone:
        assert (alone.rank, alone.world_size) == (0, 1)
        alone.barrier()
        with pytest.raises(InvalidArgument, match="rank 0 of 1 cannot send to rank 0"):
            alone.send(torch.ones(1), 0)
        with pytest.raises(InvalidArgument, match="no such rank"):
            alone.recv(1)


def test_a_second_world_is_an_error_until_the_first_is_left() -> None:
    first = barepp.init()
    with pytest.raises(barepp.UsageError, match="in a world already: leave it before"):
        barepp.init()
    first.close()
    first.close()  # a second time does nothing
    with barepp.init() as second:
        assert second is not first
        with pytest.raises(barepp.UsageError):
            barepp.init()
    with pytest.raises(ZeroDivisionError), barepp.init():
        _ = 1 / 0
    with barepp.init():  # a world that was left by an exception is left too
        pass


def test_a_world_that_was_left_is_of_no_use() -> None:
    with world("inproc", 2) as (one, two):
        first, second = World(one), World(two)
        leaving = start(first.close)
        second.close()
        leaving.result(SOON_S)
        for call in (
            lambda: first.send(torch.ones(1), 1),
            lambda: first.recv(1),
            lambda: first.isend(torch.ones(1), 1),
            lambda: first.irecv(1),
            lambda: first.barrier(),
        ):
            with pytest.raises(TransportClosed):
                call()
        assert first.left and second.left


def test_a_broadcast_brings_the_roots_message_to_every_rank() -> None:
    with world("inproc", 3) as transports:
        worlds = [World(transport) for transport in transports]
        sent = torch.arange(4.0)
        calls = [
            start(lambda w=w: w.broadcast(sent if w.rank == 1 else None, root=1))  # type: ignore[misc]
            for w in worlds
        ]
        assert all(torch.equal(call.result(SOON_S), sent) for call in calls)
        with pytest.raises(WaitTimeout, match="a broadcast from rank 1"):
            worlds[0].broadcast(None, root=1, timeout=0.01)
        assert worlds[0].position() == ""


@pytest.mark.parametrize("tag", [-1, -16, 1.0, "1", None, True, TAG_LIMIT])
def test_tags_that_cannot_be(tag: object) -> None:
    with world("inproc", 2) as (one, _):
        here = World(one)
        for call in (
            lambda: here.send(torch.ones(1), 1, tag),  # type: ignore[arg-type]
            lambda: here.isend(torch.ones(1), 1, tag),  # type: ignore[arg-type]
            lambda: here.recv(1, tag),  # type: ignore[arg-type]
            lambda: here.irecv(1, tag),  # type: ignore[arg-type]
        ):
            with pytest.raises(ValueError, match=r"a tag is an integer from 0 to 2\*\*62 - 1, not"):
                call()
        assert here.activity == ()


def test_leaving_is_collective_flushes_and_says_goodbye_last() -> None:
    with world("unix", 2) as (one, two):
        control = NotedControl()
        here, there = World(one, control), World(two, NotedControl())
        work = here.isend(torch.ones(3_000_000), 1)
        receiving = start(lambda: there.recv(0, timeout=SOON_S))
        here.close()
        assert work.is_completed()
        assert receiving.result(SOON_S).sum().item() == 3_000_000
        assert control.calls == ["last barrier", "goodbye"]
        there.close()


def test_leaving_by_an_exception_reports_it_before_anything_is_torn_down() -> None:
    with world("inproc", 2) as (one, two):
        control = NotedControl()
        here = World(one, control)
        with pytest.raises(LookupError), here:
            here.activity = ("computing", "2F3")
            raise LookupError("boom")
        (failure,) = control.calls
        assert isinstance(failure, Failure)
        assert failure.headline() == "rank 0 failed, while computing 2F3: LookupError: boom"
        World(two).send(torch.ones(1), 0)  # the connections are open
        assert not here.left
        here.close()  # but it is over
        assert len(control.calls) == 1


def test_what_another_rank_caused_is_not_reported_again() -> None:
    with world("inproc", 2) as (one, _):
        control = NotedControl()
        with pytest.raises(JobFailed), World(one, control):
            raise JobFailed(Failure(1, "exception", "boom"))
        assert control.calls == []


def test_without_a_launcher_the_peers_see_the_loss() -> None:
    with world("tcp", 2) as (one, two):
        there = World(two)
        there.irecv(0)
        with pytest.raises(ValueError, match="boom"), World(one) as here:
            here.send(torch.ones(1), 1)
            raise ValueError("boom")
        with pytest.raises(PeerLost):
            there.recv(0, tag=3, timeout=SOON_S)


def test_a_failed_leave_is_a_failure_of_this_rank() -> None:
    class NobodyComes(NotedControl):
        def barrier(self, timeout: float | None = None, *, last: bool = False) -> None:
            raise WaitTimeout(f"nothing after {timeout} s at a barrier")

    with world("inproc", 2) as (one, _):
        control = NobodyComes()
        here = World(one, control)
        with pytest.raises(WaitTimeout):
            here.close(timeout=0.1)
        (failure,) = control.calls
        assert isinstance(failure, Failure) and failure.doing == "leaving the world"
        assert not here.left


def test_barriers_and_receives_time_out() -> None:
    with world("unix", 2) as (one, _):
        here = World(one)
        with pytest.raises(WaitTimeout, match="nothing after 0.01 s of waiting for a barrier"):
            here.barrier(timeout=0.01)
        with pytest.raises(WaitTimeout, match=r"waiting for a message from rank 1 with tag 4"):
            here.recv(1, 4, timeout=0.01)


def test_a_rank_knows_what_it_is_about_while_it_waits() -> None:
    with world("inproc", 2) as (one, two):
        here, there = World(one), World(two)
        assert here.position() == ""
        receiving = start(lambda: here.recv(1, tag=9))
        while here.position() == "":
            pass
        assert here.position() == "waiting for a message from rank 1 with tag 9"
        there.send(torch.ones(1), 0, tag=9)
        receiving.result(SOON_S)
        assert here.position() == there.position() == ""
        meeting = start(here.barrier)
        while here.position() == "":
            pass
        assert here.position() == "waiting at a barrier"
        there.barrier()
        meeting.result(SOON_S)
        assert here.position() == ""


def test_a_script_that_runs_by_itself() -> None:
    script = (
        "import barepp, torch\n"
        "with barepp.init() as world:\n"
        "    print(world.rank, world.world_size, torch.get_num_threads())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, **extra},
            stdout=subprocess.PIPE,
            text=True,
        )
        for extra in ({}, {"OMP_NUM_THREADS": "2"})
    ]
    for process, threads in zip(started, (1, 2), strict=True):
        assert process.communicate(timeout=LIMIT_S)[0] == f"0 1 {threads}\n"
        assert process.returncode == 0


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_half_of_what_another_launcher_says_is_refused_rather_than_misunderstood(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "4")
    with pytest.raises(barepp.UsageError, match=f"{variable}=4"):
        barepp.init()
    monkeypatch.setenv(variable, "1")
    with barepp.init() as world:
        assert world.world_size == 1
