"""Two codes of four bits a byte, looked up as pairs of numbers.

A look-up of a byte's two numbers, as one integer of 64 bits, is the quickest portable way to expand them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nibble_pairs(values: Tensor, *, is_high_first: bool) -> Tensor:
    """Values (16,) float32 by code -> (256,) by byte: the values of its two codes, as one int64."""
    byte = torch.arange(256, device=values.device)
    low, high = values[byte & 15], values[byte >> 4]
    return torch.stack([high, low] if is_high_first else [low, high], -1).view(torch.int64).view(-1)


def look_up_pairs(codes: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Bytes (..., C / 2) -> the values of their codes in `out` (..., C), float32 and contiguous."""
    index = codes.to(torch.int32)  # half as wide as the usual int64, and as quick as it gets
    torch.index_select(pairs, 0, index.view(-1), out=out.view(-1).view(torch.int64))
