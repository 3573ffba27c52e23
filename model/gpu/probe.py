"""The least kernel: whether Triton can compile for a device, which takes a C compiler and a driver that fits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def runs(device: torch.device) -> bool:
    """Raises whatever keeps it from running."""
    x = torch.zeros(1, device=device)
    _set_to_one[(1,)](x)
    return x.item() == 1.0


@triton.jit
def _set_to_one(x):
    tl.store(x, 1.0)
