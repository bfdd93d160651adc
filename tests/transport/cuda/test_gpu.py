"""What runs on a real GPU alone: `pytest -m gpu`, on a machine with one GPU or more.

There the contract runs over it as well, with the names that end in "+cuda": ranks as threads, all
on one device. Here ranks are processes, two and four of them. Not yet run on hardware.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_cuda_ipc
import torch
from gpu_ranks import processes, told
from jobs import ROOT
from real_gpu import RealGpu, needs_cuda

from transport.cuda import driver
from transport.cuda.transport import CudaIpcTransport
from transport.errors import PeerLost
from transport.shm.transport import ShmTransport
from transport.sockets.transport import TcpTransport

pytestmark = needs_cuda


def test_this_machine_can_share_memory_of_its_gpu() -> None:
    assert driver.why_not() is None
    assert CudaIpcTransport.viable() is None


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_lend_each_other_memory(world_size: int) -> None:
    with processes(CudaIpcTransport, world_size, test_cuda_ipc.talk, RealGpu) as (_, pipes):
        for pipe in pipes:
            what, slots = told(pipe)
            assert what == "returned", slots
            assert min(slots) > 0, "nothing was lent: all was staged"


def swap(transport: Any, pipe: Any) -> bool:
    """Exchange messages by which a copy that comes too late or too early would be seen."""
    gpu, peers = (
        transport.gpu,
        [r for r in range(transport.world_size) if r != transport.rank],
    )
    for i in range(30):
        mine = torch.full((1 + 100_000 * (i % 3),), float(i), device=gpu.device)
        works = [transport.isend((torch.tensor([i]), mine), peer) for peer in peers]
        for peer in peers:
            into = (torch.zeros(1, dtype=torch.int64), torch.empty_like(mine))
            flag, got = transport.irecv(peer, into=into if i % 2 else None).wait(30)
            total = got.sum()
            del got
            assert int(flag) == i and float(total) == i * mine.numel()
        for work in works:
            work.wait(30)
        mine.fill_(-1)
    transport.close(30)
    return True


@pytest.mark.parametrize("cls", [TcpTransport, ShmTransport, CudaIpcTransport])
@pytest.mark.parametrize("world_size", [2, 4])
def test_what_arrives_is_what_was_sent(cls: type[TcpTransport], world_size: int) -> None:
    with processes(cls, world_size, swap, RealGpu) as (_, pipes):
        assert [told(pipe) for pipe in pipes] == [("returned", True)] * world_size


def until_killed(transport: Any, pipe: Any) -> str:
    other = 1 - transport.rank
    try:
        for i in range(10**6):
            transport.isend(torch.full((10**6,), float(i), device=transport.gpu.device), other)
            got = transport.recv(other, timeout=30)
            if i == 20:
                torch.cuda.synchronize()
                assert float(got[0]) == i
                pipe.send("under way")
    except PeerLost as error:
        return str(error)
    return "never"


def test_a_peer_that_is_killed_is_lost_and_its_memory_comes_back() -> None:
    free, _ = torch.cuda.mem_get_info()
    with processes(CudaIpcTransport, 2, until_killed, RealGpu) as (ranks, pipes):
        assert [told(pipe) for pipe in pipes] == ["under way"] * 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        assert told(pipes[0])[0] == "returned"
    assert torch.cuda.mem_get_info()[0] > free - 64 * 2**20


def test_the_benchmark_runs_on_it(tmp_path: Path) -> None:
    flags = ["--transports", "cuda_ipc,tcp", "--sizes", "8,1048576", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "transport.bench", *flags, "--device", "cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cuda_ipc") == 2
