"""A short soak; `python tests/soak.py` is the long one, of many thousand steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  (the first backward imports it; ranks inherit it)
from jobs import nothing_left, run_job
from soak import SAMPLES, SCRIPT, growth, samples, soak
from troubles import Pace

STEPS = 120


@pytest.mark.xdist_group("timed")
def test_nothing_grows_and_no_bit_changes_over_a_network_that_is_late(tmp_path: Path) -> None:
    with nothing_left():
        soaked = soak(tmp_path, STEPS, Pace(3, largest=400, delay_s=0.001))
    assert soaked.problems == []
    assert {name: len(looks) for name, looks in soaked.looks.items()} == dict.fromkeys(
        ["rank 0", "rank 1", "rank 2", "launcher"], SAMPLES
    )
    assert soaked.expected.startswith("learnt ")


LEAKS = {
    "blocks": "kept.extend(object() for _ in range(4))",
    # (Not from the heap: a forked rank has free room there, which its parent once used.)
    "resident": "kept.append(mmap.mmap(-1, 2**19)); kept[-1].write(bytes(2**19))",
    "descriptors": "os.dup(0)",
    "threads": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
}


def test_what_grows_is_found(tmp_path: Path) -> None:
    script = SCRIPT.format(steps=STEPS, every=STEPS // SAMPLES)
    script = script.replace("pipe.zero_grad()", "; ".join(["pipe.zero_grad()", *LEAKS.values()]))
    script = script.replace(
        "import barepp,", "import mmap, threading, time; kept = []\n    import barepp,"
    )
    found = samples(run_job(tmp_path, script, 1).said(0))
    assert len(found) == SAMPLES
    said = growth("rank 0", found)
    assert sorted(problem.split()[2] for problem in said) == sorted(LEAKS), said
