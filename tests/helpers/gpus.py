"""Whether there is a GPU, asked in another process: who asks CUDA cannot fork ranks that use it."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache

import torch

_ASK = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


@lru_cache
def why_no_gpu() -> str:
    """Return why tests that need a CUDA device cannot run here; "" where they can."""
    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} was built without CUDA"
    asked = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ASK], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        return f"no CUDA device: asking for one failed: {asked.stderr.strip().splitlines()[-1]}"
    return "" if int(asked.stdout) else "no CUDA device: torch finds none"
