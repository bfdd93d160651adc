"""The transports' benchmark measures what it says, for every transport and for gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from transport.bench import main

FIGURES = ("half_round_trip_us", "fresh_us", "one_way_gb_per_s", "both_ways_gb_per_s")


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
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
