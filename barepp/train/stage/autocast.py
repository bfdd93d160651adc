"""Autocast: matrix products in half precision, the weights and what has to be exact in float32.

`with torch.autocast(…)` goes around a microbatch's forward and loss, and around nothing else; a
backward takes the precision that each operation had. (PyTorch's manual, "Automatic Mixed
Precision".) The bits are those of one process that does the same, because

1. one forward of a stage is one `autocast`, recomputed ones too: a weight that several layers use
   is then converted once, and its uses add their gradients in half precision, as in one process;
2. what enters a stage is no leaf of the graph when the first layer gets it (stage.py): autocast
   would take it for a weight, and convert it once where one process converts it for each use;
3. ranks that are threads take turns: torch keeps one set of converted weights a process, and each
   end of an `autocast` throws all of them away.
"""

from __future__ import annotations

from typing import Final

import torch

from barepp.errors import UsageError

HALVES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast can be, by the names that flags take."""


def check_autocast(autocast: object, device: torch.device) -> None:
    """Refuse what autocast cannot be, or not on this device."""
    if not isinstance(autocast, torch.dtype) or autocast not in HALVES.values():
        names = " or ".join(map(str, HALVES.values()))
        raise UsageError(f"autocast is {names}, or None for none, not {autocast!r:.100}")
    if (
        device.type == "cuda"
        and autocast is torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise UsageError(f"{name} ({device}) has no bfloat16: take torch.float16 and a LossScaler")
