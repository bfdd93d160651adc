"""Which device: what is asked for, what there is, and one answer for all ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clusters import launch_forked
from gpus import why_no_gpu
from jobs import ROOT, launch
from ports import free_port
from starter import Starter

import barepp
from barepp.launch import threads
from barepp.worker import devices
from barepp.worker.devices import chosen_device, num_gpus, on_gpus
from barepp.worker.external.environment import options_from
from barepp.worker.spec import Options
from transport.cuda import device as gpu_module
from transport.errors import JobFailed, UnknownTransport
from transport.registry import NEED_GPU, transport_names


def test_what_is_not_named_is_the_cpu_unless_the_transport_is_for_gpus() -> None:
    for transport in transport_names():
        expected = "cuda" if transport in NEED_GPU else "cpu"
        assert chosen_device(None, transport) == expected
        assert chosen_device("cuda", transport) == "cuda"
    assert chosen_device("auto", "auto") == "auto"
    assert chosen_device("auto", "nccl") == "cuda"  # there is nothing to choose
    assert chosen_device("cpu", "tcp") == "cpu"


def test_what_cannot_be_is_one_sentence() -> None:
    with pytest.raises(barepp.UsageError, match=r"no device 'gpu'; these exist: cpu, cuda, auto$"):
        chosen_device("gpu", "auto")
    with pytest.raises(barepp.UsageError, match="transport nccl .* device cpu has none .*: leave"):
        chosen_device("cpu", "nccl")
    with pytest.raises(UnknownTransport):
        chosen_device("cpu", "tpc")


def test_all_ranks_compute_on_gpus_or_none() -> None:
    assert on_gpus("auto", [1, 8, 2])
    assert not on_gpus("auto", [1, 0, 2])
    assert not on_gpus("cpu", [1, 1])
    assert on_gpus("cuda", [1, 1])


def test_the_environment_says_it_too() -> None:
    assert options_from(2, {}).device == "cpu"
    assert options_from(2, {"BAREPP_DEVICE": "auto"}).device == "auto"
    assert options_from(2, {"BAREPP_TRANSPORT": "nccl"}).device == "cuda"
    with pytest.raises(barepp.UsageError, match="no device"):
        options_from(2, {"BAREPP_DEVICE": "tpu"})
    with pytest.raises(barepp.UsageError, match="device cpu has none there"):
        options_from(2, {"BAREPP_DEVICE": "cpu", "BAREPP_TRANSPORT": "nccl"})


# -- as ranks find it -----------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


SCRIPT = "import barepp\nwith barepp.init() as world:\n    print('device', world.device)\n"


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU here")
def test_ranks_that_find_no_gpu_say_so_once_and_auto_takes_the_cpu(
    starter: Starter, tmp_path: Path
) -> None:
    ended = launch_forked(starter, tmp_path, SCRIPT, "--world", "2", "--device", "auto")
    assert ended.code == 0
    assert ended.out.count("device cpu") == 2
    ended = launch_forked(starter, tmp_path, SCRIPT, "--world", "2", "--device", "cuda")
    assert ended.code == 2
    assert "device cuda was asked for, but rank " in ended.err
    assert "finds no GPU: " in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "gpu"], "there is no device 'gpu'; these exist: cpu, cuda, auto"),
        (["--device", "cpu", "--transport", "nccl"], "transport nccl moves tensors from GPU to"),
    ],
)
def test_the_launcher_refuses_what_cannot_be(
    flags: list[str], sentence: str, tmp_path: Path
) -> None:
    ended = launch(tmp_path, SCRIPT, "--world", "2", *flags)
    assert ended.code == 2
    assert ended.err.startswith(f"barepp.launch: {sentence}") and ended.err.count("\n") == 1


def counts_of(found: list[int]):
    """What each rank finds, instead of asking CUDA; a forked rank inherits it."""

    def count(device: str, rank: int) -> int:
        return 0 if device == "cpu" else found[rank]

    return count


def test_a_rank_without_a_gpu_keeps_all_others_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from barepp.worker import init as joining

    monkeypatch.setattr(joining, "num_gpus", counts_of([2, 0, 1]))
    monkeypatch.setattr(joining, "own_gpu", lambda *_: pytest.fail("nobody may use one"))

    def work(world: barepp.World) -> str:  # not importable: forked from here
        world.barrier()
        return str(world.device)

    assert barepp.run(work, 3, device="auto") == ["cpu"] * 3


def test_ranks_share_the_gpus_that_their_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks for the GPU of its number among the ranks of its host, modulo their count."""
    from barepp.worker import init as joining

    def own_gpu(local_rank: int, count: int) -> None:
        raise barepp.UsageError(f"GPU {local_rank % count} of {count} for {local_rank}")

    monkeypatch.setattr(joining, "num_gpus", counts_of([2, 2, 2]))
    monkeypatch.setattr(joining, "own_gpu", own_gpu)

    def work(world: barepp.World) -> None:
        raise AssertionError("it has no GPU to work on")

    with pytest.raises(JobFailed, match=r"GPU (0 of 2 for 0|1 of 2 for 1|0 of 2 for 2)"):
        barepp.run(work, 3, device="auto")


def test_all_ranks_are_asked_for_the_same(starter: Starter, tmp_path: Path) -> None:
    """Under torchrun each process has an environment of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nos.environ['BAREPP_DEVICE'] = ['cpu', 'auto'][int(os.environ['RANK'])]\n"
        + SCRIPT
    )
    ranks, port = [], free_port()
    for rank in range(2):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port - 1),
            "TMPDIR": str(tmp_path),
        }
        ranks.append(starter.start(script, environment))
    ends = [rank.wait() for rank in ranks]
    assert 0 not in [end.code for end in ends]
    told = [end.err for end in ends]
    assert any("it runs on device" in text and "all must run the same" in text for text in told)


def test_a_process_by_itself_says_it_to_init_or_to_the_environment(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with barepp.init(device="auto") as world:
        assert world.device == torch.device("cpu")
        world.synchronize()
    with pytest.raises(barepp.UsageError, match="device cuda was asked for, but rank 0 finds no"):
        barepp.init(device="cuda")
    monkeypatch.setenv("BAREPP_DEVICE", "cuda")
    with pytest.raises(barepp.UsageError, match="device cuda was asked for, but rank 0 finds no"):
        barepp.init()
    with barepp.init(device="cpu") as world:  # what the script says is nearer
        assert world.device == torch.device("cpu")


def test_what_a_script_says_has_to_be_what_its_launcher_said(
    starter: Starter, tmp_path: Path
) -> None:
    script = SCRIPT.replace("init()", "init(device='cpu')")
    assert launch_forked(starter, tmp_path, script, "--world", "2").code == 0
    ended = launch_forked(starter, tmp_path, script, "--world", "2", "--device", "auto")
    assert ended.code == 2
    assert "was started with device auto, not cpu: tell the launcher (--device cpu" in ended.err


def test_threads_take_the_cpu_too_where_no_gpu_is(no_gpu: None) -> None:
    def work(world: barepp.World) -> str:
        return str(world.device)

    assert barepp.run(work, 2, transport="inproc", device="auto") == ["cpu"] * 2
    with pytest.raises(barepp.UsageError, match="finds no GPU"):
        barepp.run(work, 2, transport="inproc", device="cuda")


def test_ranks_cannot_be_forked_from_a_process_that_uses_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def work(world: barepp.World) -> None:
        """Not importable: it would be forked from here."""

    with pytest.raises(barepp.UsageError, match="CUDA is in use in this process"):
        barepp.run(work, 2, device="cuda")
    assert barepp.run(work, 1) == [None]  # on the CPU that does not matter


def test_a_rank_that_is_forked_from_who_has_asked_cuda_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.cuda.is_available() asks CUDA but does not initialise torch's part of it, so that only
    the child knows. To it CUDA says that there is no GPU, while NVML, which is asked for how many
    there are, can say so as ever.
    """
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for count in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(barepp.UsageError, match="rank 1 .* forked from .* has asked CUDA"):
            num_gpus("cuda", 1)
    with pytest.raises(barepp.UsageError, match="has asked CUDA"):
        num_gpus("auto", 1)  # not the CPU, where there are GPUs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert num_gpus("auto", 1) == 0


def test_the_cpu_never_asks_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_available", "device_count", "init", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was asked"))
    assert num_gpus("cpu", 0) == 0
    with barepp.init() as world:
        assert world.device.type == "cpu"


def test_whoever_forks_ranks_never_asks_cuda() -> None:
    """The fork server imports what ranks need, the launcher starts them: neither asks anything."""
    code = """
import torch, torch._dynamo
def asked(*_):
    raise SystemExit("CUDA was asked")
for name in ("is_available", "device_count", "init", "_lazy_init", "set_device", "current_device"):
    setattr(torch.cuda, name, asked)
import barepp.launch.processes.preload, barepp.worker.main, barepp.train.pipeline
import barepp.train.loss_scaler, barepp.launch.job, barepp.launch.run
import transport.sockets.transport, transport.shm.transport, transport.cuda.device, transport.inproc
assert not torch.cuda.is_initialized()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


class Made:
    """What `Cuda` is made of, without CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


def test_threads_leave_the_current_device_of_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "Cuda", Made)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("not in this thread"))
    monkeypatch.setattr(threads, "num_gpus", counts_of([2]))
    crew = threads.Crew(Options(3, device="auto"))
    assert [world.device.index for world in crew.worlds] == [0, 1, 0]


def test_a_gpu_is_the_current_device_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(gpu_module, "Cuda", Made)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    made = [devices.own_gpu(local_rank, 2).device for local_rank in range(5)]
    assert made == current == [torch.device("cuda", index) for index in (0, 1, 0, 1, 0)]
