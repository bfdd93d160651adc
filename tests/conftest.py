"""What every test needs: one compute thread, and the demos' modules within reach."""

import sys
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("jobs")  # its assertions explain themselves as well

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demos"))  # as when a demo runs: its own folder comes first


@pytest.fixture(scope="session", autouse=True)
def one_compute_thread() -> None:
    # With more threads a sum is cut into more parts, and rounds differently.
    torch.set_num_threads(1)
