"""The transports' benchmark measures what it says, for every transport and for gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fake_gpu
import pytest
import torch.distributed

from transport.bench.__main__ import main
from transport.bench.measure import Settings, measure
from transport.sockets.handshake import new_secret

FIGURES = ("half_round_trip_us", "fresh_us", "one_way_gb_per_s", "both_ways_gb_per_s")


@pytest.mark.xdist_group("timed")
def test_every_transport_is_measured_beside_gloo_and_a_copy(tmp_path: Path) -> None:
    names = ["shm", "unix", "tcp"]
    if torch.distributed.is_gloo_available():
        names += ["torch_dist", "gloo"]  # our transport over gloo, and gloo by itself
    path = tmp_path / "rows.json"
    flags = ["--transports", ",".join(names), "--sizes", "8,200000", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "transport.bench", *flags, "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Failed to initialize NumPy" not in done.stderr
    rows = json.loads(path.read_text())
    expected = [(name, size) for size in (8, 200_000) for name in (*names, "copy")]
    assert [(row["transport"], row["nbytes"]) for row in rows] == expected
    for row in rows:
        assert all(row[figure] > 0 or row["nbytes"] == 8 for figure in FIGURES), row
        low, high = row["half_round_trip_us_quartiles"]
        assert 0 < low <= row["half_round_trip_us"] <= high
        assert f"{row['half_round_trip_us']:.1f}" in done.stdout
    trip = {row["transport"]: row["half_round_trip_us"] for row in rows if row["nbytes"] == 8}
    assert trip["copy"] < min(trip[name] for name in names)  # nothing beats a copy in one process


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--transports", "pigeon"], "pigeon"),
        (["--transports", "inproc"], "no second process"),
        (["--sizes", "0"], "start at 1"),
        (["--sizes", "many"], "many"),
        (["--rounds", "0"], "start at 1"),
        (["--transports", "shm", "--device", "cuda"], "no CUDA device"),
        (["--transports", "cuda_ipc"], "'cuda_ipc' cannot be used here"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def late_gpu(rank: int) -> fake_gpu.FakeGpu:
    return fake_gpu.FakeGpu(rank, LATE_S)


LATE_S = 0.004


@pytest.mark.xdist_group("timed")
def test_on_a_gpu_what_is_timed_is_the_end_of_the_copies() -> None:
    """Each copy of this GPU takes 2 ms on average; who times the calls alone finds less.

    How much more a busy machine takes is not looked at.
    """
    names = ("cuda_ipc", "tcp")
    settings = Settings(names, (2**20,), 1, new_secret(), late_gpu)
    rows = {row["transport"]: row for row in measure(settings, print)}
    assert set(rows) == {*names, "copy"}
    copy_us = LATE_S / 2 * 1e6
    assert 0.5 * copy_us < rows["copy"]["half_round_trip_us"]
    assert 0.5 * copy_us < rows["cuda_ipc"]["fresh_us"]
    assert 1.4 * copy_us < rows["tcp"]["fresh_us"]  # to page-locked memory, and from it
    assert all(row["both_ways_gb_per_s"] >= 0 for row in rows.values())
