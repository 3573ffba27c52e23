"""Expanding rows by way of float32, in pieces that stay in a processor's caches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PIECE_ELEMENTS = 2**18
"""1 MiB of float32."""


def through_float32(out: Tensor, fill: Callable[[slice, Tensor], None]) -> None:
    """Calls `fill(rows, into)` for parts of out's rows (n, C); `into` is contiguous float32, and rounded to `out`."""
    count, width = out.shape
    is_direct = out.dtype == torch.float32 and out.is_contiguous() and out.storage_offset() % 2 == 0
    step = max(1, PIECE_ELEMENTS // max(1, width)) if out.device.type == "cpu" else max(1, count)
    buffer = out if is_direct else out.new_empty((min(step, count), width), dtype=torch.float32)
    for start in range(0, count, step):
        here = slice(start, min(start + step, count))
        into = out[here] if is_direct else buffer[: here.stop - start]
        fill(here, into)
        if not is_direct:
            out[here].copy_(into)
