"""Freed memory stays: the second step of the same sizes touches no new page."""

from __future__ import annotations

import os
import subprocess
import sys

COUNT = """
import resource, torch
from barepp.worker.process import keep_freed_memory
keep_freed_memory()
def step():
    kept = [torch.ones(2**20) for _ in range(24)]
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(processes: int) -> list[int]:
    """Run that many processes at one time; return what each counted."""
    command = [sys.executable, "-W", "ignore", "-c", COUNT]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) for _ in range(processes)
    ]
    return [int(process.communicate()[0]) for process in started]


def test_the_next_step_finds_its_memory_warm():
    """Without it the same program has none or 245440, by what happens to lie above the blocks."""
    counted = page_faults(3)
    assert max(counted) < 100, counted
