"""Freed memory stays: the second step of the same sizes touches no new page."""

from __future__ import annotations

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


def page_faults() -> int:
    command = [sys.executable, "-W", "ignore", "-c", COUNT]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_next_step_finds_its_memory_warm():
    """Without it the same program has none or 245440, by what happens to lie above the blocks."""
    assert [page_faults() < 100 for _ in range(3)] == [True] * 3
