"""Freed memory stays: the second step of the same sizes touches no new page."""

from __future__ import annotations

import subprocess
import sys

COUNT = """
import resource, torch
from barepp.warm import keep_freed_memory
if {}:
    keep_freed_memory()
def step():
    kept = [torch.ones(2**20 + i) for i in range(6)]
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(kept: bool) -> int:
    command = [sys.executable, "-W", "ignore", "-c", COUNT.format(kept)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_next_step_finds_its_memory_warm():
    assert page_faults(True) < 100  # of 61440 pages
    assert page_faults(False) > 1000
