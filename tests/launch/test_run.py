"""`barepp.run`: a function on several ranks, as threads and as processes; what comes back."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import nothing_left
from transport_worlds import SOON_S, start

import barepp
from barepp.launch.threads import Crew
from barepp.worker.spec import Options
from barepp.worker.world import World
from transport.errors import WaitTimeout
from transport.registry import transport_names

ALL = ["inproc", "tcp", "unix", "shm", "auto"]
PROCESSES = ["tcp", "shm"]


def times(world: World, factor: int) -> int:
    """A function that another process can import; its ranks start from a fork server."""
    return world.rank * factor


class Unreachable:
    """What a result must not be: the caller cannot unpickle it."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _only_in_a_rank, ()


def _only_in_a_rank() -> None:
    raise ValueError("not here")


@pytest.mark.parametrize("transport", ALL)
def test_results_come_in_rank_order(transport: str) -> None:
    def ring(world: World, start: int) -> tuple[int, float]:
        right, left = (world.rank + 1) % world.world_size, (world.rank - 1) % world.world_size
        work = world.isend(torch.tensor(float(start + world.rank)), right)
        got = world.recv(left).item()
        work.wait()
        return world.rank, got

    with nothing_left():
        results = barepp.run(ring, 4, 10, transport=transport)
    assert results == [(0, 13.0), (1, 10.0), (2, 11.0), (3, 12.0)]


def test_an_importable_function_starts_from_a_fork_server() -> None:
    with nothing_left():
        assert barepp.run(times, 2, 10) == [0, 10]


@pytest.mark.parametrize("transport", ["inproc", "tcp"])
def test_a_lambda_and_a_world_of_one(transport: str) -> None:
    assert barepp.run(lambda world: world.world_size, 1, transport=transport) == [1]
    assert barepp.run(lambda world, *args: args, 2, None, "x", transport=transport) == [
        (None, "x"),
        (None, "x"),
    ]


@pytest.mark.parametrize("transport", ["inproc", "tcp"])
def test_an_exception_is_raised_with_its_own_traceback(transport: str) -> None:
    def fail(world: World) -> None:
        if world.rank == 1:
            raise LookupError("not found on rank 1")
        world.recv(1)

    with nothing_left(), pytest.raises(barepp.JobFailed) as caught:
        barepp.run(fail, 3, transport=transport)
    failure = caught.value.failure
    assert (failure.rank, failure.cause) == (1, "exception")
    assert failure.message == "LookupError: not found on rank 1"
    text = str(caught.value)
    assert "Traceback of rank 1" in text and "in fail" in text
    assert "worker.py" not in text and "threads.py" not in text


@pytest.mark.parametrize("transport", ["inproc", "tcp"])
def test_sys_exit_is_a_failure(transport: str) -> None:
    with pytest.raises(barepp.JobFailed, match=r"it called sys.exit\(4\)") as caught:
        barepp.run(lambda world: sys.exit(4), 1, transport=transport)
    assert caught.value.failure.exit_code == 4


@pytest.mark.parametrize("transport", PROCESSES)
def test_a_killed_rank_is_named(transport: str) -> None:
    def die(world: World) -> None:
        if world.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()

    with nothing_left(), pytest.raises(barepp.JobFailed, match="rank 2 failed: .* SIGKILL"):
        barepp.run(die, 3, transport=transport)


def test_a_forked_rank_runs_its_own_exit_handlers_and_not_the_programs(tmp_path: Path) -> None:
    """A forked process has a copy of them: the first rank to end removed the program's folder."""
    said = tmp_path / "said"
    atexit.register(programs := lambda: said.open("a").write("the program's "))
    folder = tempfile.TemporaryDirectory()

    def leave(world: World) -> None:
        atexit.register(lambda: said.open("a").write("a rank's "))
        weakref.finalize(world, lambda: said.open("a").write("finalizer "))

    try:
        barepp.run(leave, 2, transport="tcp")
        assert os.path.isdir(folder.name)
        assert sorted(said.read_text().split()) == sorted(["a", "rank's", "finalizer"] * 2)
    finally:
        atexit.unregister(programs)
        folder.cleanup()


@pytest.mark.parametrize("transport", ["inproc", "tcp"])
def test_big_results_and_tensors(transport: str) -> None:
    def big(world: World) -> tuple[bytes, torch.Tensor]:
        return bytes([world.rank]) * 10_000_000, torch.full((1000, 1000), float(world.rank))

    for rank, (data, tensor) in enumerate(barepp.run(big, 3, transport=transport)):
        assert data == bytes([rank]) * 10_000_000
        assert torch.equal(tensor, torch.full((1000, 1000), float(rank)))


def test_a_rank_that_dies_in_the_midst_of_its_result_blocks_nobody() -> None:
    class Slow:
        """Pickles its first megabytes, then dies."""

        def __reduce__(self) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(barepp.JobFailed, match="SIGKILL"):
        barepp.run(lambda world: (b"x" * 5_000_000, Slow()) if world.rank else None, 2)


def test_a_result_that_cannot_be_pickled_is_named() -> None:
    with nothing_left(), pytest.raises(barepp.JobFailed) as caught:
        barepp.run(lambda world: threading.Lock() if world.rank == 1 else 0, 2)
    assert "what rank 1 returned, a lock, cannot be pickled" in caught.value.failure.message
    assert caught.value.failure.traceback == ""


def test_a_result_that_cannot_be_unpickled_is_named() -> None:
    with nothing_left(), pytest.raises(barepp.BareppError, match="what rank 0 returned cannot be"):
        barepp.run(lambda world: Unreachable(), 1, transport="tcp")


def test_forked_from_a_thread_of_a_pool() -> None:
    """At its end a rank waits for its own pools, and for nobody of the pool that it came from."""

    def work(world: barepp.World) -> int:
        pool = ThreadPoolExecutor(1)  # left open
        return pool.submit(lambda: 10 * world.rank).result()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(int).result()  # (another thread of it, which the ranks do not have)
        ran = pool.submit(lambda: barepp.run(work, 2))
        assert ran.result(60) == [0, 10]


@pytest.mark.parametrize("transport", ["inproc", "tcp"])
def test_from_another_thread_and_two_at_once(transport: str) -> None:
    """Signals are the main thread's; a second job has nothing to do with the first."""

    def work(world: World, base: int) -> int:
        world.barrier()
        return base + world.rank

    with nothing_left():
        first = start(lambda: barepp.run(work, 2, 10, transport=transport))
        second = start(lambda: barepp.run(work, 3, 20, transport=transport))
        assert first.result(60) == [10, 11]
        assert second.result(60) == [20, 21, 22]


def test_two_fork_servers_at_once_leave_the_programs_own_alone() -> None:
    import multiprocessing
    from multiprocessing import forkserver

    before = dict(vars(forkserver._forkserver))  # type: ignore[attr-defined]
    usual = forkserver.connect_to_new_process
    temporary = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    with nothing_left():
        works = [start(lambda: barepp.run(times, 2, 3)) for _ in range(2)]
        assert [work.result(60) for work in works] == [[0, 3], [0, 3]]
    assert dict(vars(forkserver._forkserver)) == before  # type: ignore[attr-defined]
    assert forkserver.connect_to_new_process is usual
    assert multiprocessing.current_process()._config.get("tempdir") == temporary  # type: ignore[attr-defined]


def test_what_ranks_print_goes_to_this_programs_streams(capsys: pytest.CaptureFixture[str]) -> None:
    def say(world: World) -> None:
        print("hello from", world.rank)
        print("oh", file=sys.stderr)

    barepp.run(say, 2, transport="tcp")
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["[rank 0] hello from 0", "[rank 1] hello from 1"]
    assert sorted(err.splitlines()) == ["[rank 0] oh", "[rank 1] oh"]


def test_a_forked_rank_does_not_keep_the_callers_signal_handlers() -> None:
    def handlers(world: World) -> tuple[bool, bool]:
        return (
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        )

    assert barepp.run(handlers, 2, transport="tcp") == [(True, True)] * 2


def test_ctrl_c_ends_the_job_and_then_the_program_as_usual() -> None:
    def stay(world: World, pid: int) -> None:
        if world.rank == 0:
            os.kill(pid, signal.SIGINT)
        world.recv(1 - world.rank)

    for transport in ("tcp", "inproc"):
        with nothing_left(), pytest.raises(KeyboardInterrupt):
            barepp.run(stay, 2, os.getpid(), transport=transport)


def test_a_thread_that_cannot_be_ended_is_left_behind_after_the_grace() -> None:
    release = threading.Event()

    def stuck(world: World) -> None:
        if world.rank == 0:
            assert release.wait(SOON_S)
        raise ValueError("boom")

    began = time.monotonic()
    with pytest.raises(barepp.JobFailed, match="rank 1 failed: ValueError: boom"):
        barepp.run(stuck, 2, transport="inproc", grace=0.1)
    assert time.monotonic() - began < 5.0
    release.set()


def test_survivors_over_inproc_are_told_what_they_were_doing() -> None:
    told: dict[int, str] = {}

    def work(world: World) -> None:
        if world.rank == 2:
            world.recv(0)
            world.recv(1)
            raise ValueError("boom")
        try:
            world.send(torch.ones(1), 2)
            world.barrier() if world.rank else world.recv(2, tag=5)
        except barepp.JobFailed as error:
            told[world.rank] = str(error)
            raise

    with pytest.raises(barepp.JobFailed, match="boom"):
        barepp.run(work, 3, transport="inproc")
    assert "rank 2 failed: ValueError: boom" in told[0] and "rank 2 failed" in told[1]
    assert all("This rank was" in text for text in told.values())


@pytest.mark.parametrize("transport", ["inproc", "tcp"])
def test_a_barrier_that_timed_out_is_waited_for_again(transport: str) -> None:
    def work(world: World) -> str:
        if world.rank == 0:
            try:
                world.barrier(timeout=0.05)
            except WaitTimeout as error:
                world.send(torch.ones(1), 1)
                world.barrier()
                return str(error)
        world.recv(0)
        world.barrier()
        return ""

    first, _ = barepp.run(work, 2, transport=transport)
    assert first == "rank 0: nothing after 0.05 s at a barrier"


def test_a_barrier_that_ended_after_its_timeout_is_not_taken_for_the_next() -> None:
    """The release came between the call that timed out and its repetition: a rank hung for ever."""
    first, second = Crew(Options(2)).controls
    for _ in range(2):
        with pytest.raises(WaitTimeout):
            first.barrier(timeout=0.01)
        second.barrier(timeout=SOON_S)
        first.barrier(timeout=0.0)  # over already
    with pytest.raises(WaitTimeout):
        second.barrier(timeout=0.01)
    first.barrier(timeout=SOON_S)
    leaving = start(lambda: second.barrier(SOON_S, last=True))
    first.barrier(SOON_S, last=True)
    leaving.result(SOON_S)


@pytest.mark.parametrize("world_size", [0, -1, "2", 1.5, True])
def test_a_world_that_cannot_be(world_size: Any) -> None:
    with pytest.raises(barepp.UsageError, match="a world has at least one rank"):
        barepp.run(times, world_size, 1)


def test_an_unknown_transport_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match=", ".join(transport_names())):
        barepp.run(times, 2, 1, transport="pigeon")
