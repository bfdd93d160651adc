"""Training on a GPU: two and four ranks on one device learn what one process learns there.

Not yet run on hardware. Every rank is a process of its own that a fresh fork server makes, and so
is the one that they are compared with: the tests' own process never uses CUDA.

    python -m pytest -m gpu
"""

from __future__ import annotations

import json
import os
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpt_model import gpt, loss_fn
from gpus import why_no_gpu
from torch import nn
from torch.nn import functional
from traces import check_format

import barepp
from barepp.testing import run_with_fault
from barepp.trace.analysis import copies
from barepp.trace.chrome_reader import read_trace
from barepp.trace.collect import write_trace
from barepp.train.models import LayerBuilder, LinearReLU
from transport.registry import transport_names

pytestmark = pytest.mark.gpu

SEED, STEPS, ROWS = 3, 4, 48
TRANSPORTS = [name for name in ("cuda_ipc", "shm", "unix", "tcp") if name in transport_names()]
TWO_STAGES_A_RANK = ("interleaved_1f1b", "zb_v")


def exactly() -> None:
    """Have kernels that give the same bits each time (PyTorch's manual, "Reproducibility")."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def mlp() -> list[LayerBuilder]:
    return barepp.mlp(16, 128)


def with_dropout() -> list[LayerBuilder]:
    block = [partial(LinearReLU, 96, 96), partial(nn.Dropout, 0.2), partial(nn.LayerNorm, 96)]
    return [partial(nn.Linear, 64, 96), *(block * 3), partial(nn.Linear, 96, 10)]


MODELS = {"mlp": mlp, "dropout": with_dropout}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, 64, generator=generator)
    return inputs, torch.randint(0, 10, (ROWS,), generator=generator)


Found = tuple[list[float], str]


def train(world: barepp.World, model: str, schedule: str, **options: Any) -> Found:
    """A few steps; importable, so that a fresh process makes it."""
    exactly()
    assert world.device.type == "cuda"
    pipe = barepp.Pipeline(
        world,
        MODELS[model](),
        functional.cross_entropy,
        schedule=schedule,
        num_microbatches=6,
        seed=SEED,
        sample=batch(0),
        **options,
    )
    optimizer = torch.optim.Adam(pipe.parameters(), lr=0.01)
    take_step = optimizer.step
    if options.get("autocast") is torch.float16:
        take_step = partial(barepp.LossScaler(pipe, init_scale=2.0**20).step, optimizer)
    losses = []
    for step in range(STEPS):
        pipe.zero_grad()
        inputs, targets = batch(step)
        loss = pipe.step(inputs.pin_memory(), targets)
        take_step()
        assert loss.device == world.device
        losses.append(loss.item())
    assert {parameter.device for parameter in pipe.parameters()} == {world.device}
    losses.append(pipe.evaluate(*batch(0)).item())
    return losses, pipe.parameters_sha256()


def run(world_size: int, model: str, schedule: str, transport: str, **options: Any) -> list[Any]:
    work = partial(train, **options) if options else train
    return barepp.run(work, world_size, model, schedule, transport=transport, device="cuda")


@lru_cache
def alone(model: str, autocast: torch.dtype | None = None) -> Found:
    [found] = run(1, model, "naive", "auto", autocast=autocast)
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb_h1", "interleaved_1f1b", "zb_v"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_on_one_gpu_learn_the_bits_of_one_process_there(
    transport: str, schedule: str, world_size: int
) -> None:
    results = run(world_size, "mlp", schedule, transport)
    assert results == [alone("mlp")] * world_size


@pytest.mark.parametrize("recompute", ["off", "all"])
def test_dropout_masks_do_not_depend_on_the_cut_there_either(recompute: str) -> None:
    for world_size, schedule in ((2, "1f1b"), (4, "zb_h1")):
        results = run(world_size, "dropout", schedule, "auto", recompute=recompute)
        assert results == [alone("dropout")] * world_size


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_bits_of_one_process_too(autocast: torch.dtype) -> None:
    for world_size, schedule in ((2, "1f1b"), (2, "zb_v"), (4, "1f1b")):
        results = run(world_size, "mlp", schedule, "auto", autocast=autocast)
        assert results == [alone("mlp", autocast)] * world_size
    assert alone("mlp", autocast)[1] != alone("mlp")[1]


def test_a_balanced_partition_is_measured_on_the_gpu() -> None:
    assert run(2, "mlp", "1f1b", "auto", partition="balanced") == [alone("mlp")] * 2


def test_the_weights_begin_as_on_the_cpu() -> None:
    [(gpu, _)] = barepp.run(initial, 1, device="cuda")
    [(cpu, _)] = barepp.run(initial, 1)
    assert gpu == cpu


def initial(world: barepp.World) -> tuple[str, str]:
    pipe = barepp.Pipeline(world, mlp(), functional.cross_entropy, seed=SEED)
    return pipe.parameters_sha256(), str(world.device)


def train_gpt(world: barepp.World) -> list[float]:
    size = SimpleNamespace(blocks=3, width=64, heads=4, context=32, dropout=0.1)
    pipe = barepp.Pipeline(world, gpt(size), loss_fn, num_microbatches=4, seed=SEED)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(0, 256, (8, 33), generator=generator)
        pipe.zero_grad()
        losses.append(pipe.step(text[:, :-1], text[:, 1:]).item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_transformer_learns_alike(transport: str) -> None:
    """Its attention adds up in an order that changes, so the last digits may as well."""
    [expected] = barepp.run(train_gpt, 1, device="cuda")
    for losses in barepp.run(train_gpt, 2, device="cuda", transport=transport):
        assert losses == pytest.approx(expected, rel=1e-4)


WIDE, MICROBATCH = 2048, 2048  # 16 MiB from rank to rank


def train_traced(world: barepp.World, path: Path) -> tuple[float, list[float]]:
    layers = [partial(LinearReLU, WIDE, WIDE)] * 8
    pipe = barepp.Pipeline(world, layers, functional.mse_loss, num_microbatches=8)
    inputs = torch.randn(8 * MICROBATCH, WIDE) if world.rank in (0, pipe.last_rank) else None
    for step in range(6):
        if step == 2:
            pipe.trace()
        pipe.step(inputs, inputs)
    write_trace(world, pipe.recorder, path)
    summary = barepp.summarise(world, pipe.recorder, pipe.peak_in_flight)
    return summary.step_ms, [rank.computing_ms for rank in summary.ranks]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_trace_shows_the_devices_times_and_what_overlaps(transport: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    results = barepp.run(train_traced, 2, path, transport=transport, device="cuda")
    trace = read_trace(path)
    check_format(json.loads(path.read_text()))
    flops = 2 * MICROBATCH * WIDE * WIDE * 4  # of a forward: four layers
    for rank in trace.ranks:
        assert len(rank.actions) == 4 * 16
        for span in rank.actions:
            assert span.asked <= span.start < span.end
            # Host times would be some tens of µs, whatever the size.
            assert flops / ((span.end - span.start) * 1e-9) < 2e15
    step_ms, computing_ms = results[0]
    assert all(0 < ms <= step_ms for ms in computing_ms)
    found = copies(trace)
    assert found.copies > 0 and found.nbytes >= 3 * 16 * MICROBATCH * WIDE * 4
    assert 0 < found.hidden_ns <= found.total_ns  # some of it beside the computing


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_rank_that_is_killed_on_the_gpu_is_told_as_ever(when: str, transport: str) -> None:
    outcome = run_with_fault(
        train,
        world=2,
        rank=1,
        at="1F3",
        when=when,
        args=("mlp", "1f1b"),
        transport=transport,
        device="cuda",
        step=1,
    )
    outcome.check(told_within_s=2.0)
    assert outcome.exit_code == 137


def fail_in_a_kernel(world: barepp.World) -> None:
    """An index that is out of range: CUDA tells of it later."""
    layers = [partial(nn.Embedding, 4, 8), partial(nn.Linear, 8, 8)]
    pipe = barepp.Pipeline(world, layers, functional.mse_loss, num_microbatches=2)
    pipe.step(torch.tensor([0, 1, 2, 7]), torch.zeros(4, 8)).item()


def test_an_error_that_cuda_tells_late_names_the_rank() -> None:
    with pytest.raises(barepp.JobFailed) as raised:
        barepp.run(fail_in_a_kernel, 2, device="cuda")
    assert raised.value.failure.rank == 0
    assert "CUDA_LAUNCH_BLOCKING=1" in raised.value.failure.message


def devices_of(world: barepp.World) -> tuple[str, int]:
    return str(world.device), torch.cuda.current_device()


def test_ranks_take_the_gpus_in_turns_and_auto_finds_them() -> None:
    count = barepp.run(count_gpus, 1, device="cuda")[0]
    expected = [(f"cuda:{rank % count}", rank % count) for rank in range(3)]
    assert barepp.run(devices_of, 3, device="auto") == expected


def count_gpus(world: barepp.World) -> int:
    return torch.cuda.device_count()


def test_why_these_tests_are_skipped_is_a_sentence() -> None:
    assert why_no_gpu() == ""
