"""Tables that turn packed codes into numbers, two at a time.

A look-up with 32-bit indices is the quickest portable way to expand codes of 4 and 8 bits: a table entry holds two
numbers, and is copied as one integer of their joint width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_JOINT = {2: torch.int32, 4: torch.int64}
"""The integer as wide as two numbers, by the bytes of one."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of e2m1, by code."""

INT4 = tuple(float(code - 8) for code in range(16))
"""Integers that are stored with 8 added to them."""


@functools.cache
def nibble_pairs(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table (256,) of pairs in `dtype`: the value of a byte's low four bits, then that of its high ones."""
    byte, value = torch.arange(256), torch.tensor(values, dtype=dtype)
    pairs = torch.stack([value[byte & 15], value[byte >> 4]], -1)
    return pairs.view(_JOINT[dtype.itemsize]).view(-1).to(device)


@functools.cache
def float8_values(code: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table (256,) in `dtype` of the values of `code`, a type of 8 bits."""
    return torch.arange(256, dtype=torch.uint8).view(code).to(torch.float32).to(dtype).to(device)


@functools.cache
def float8_pairs(code: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table (65536,) of pairs in `dtype`: the value of the first of two bytes, then that of the second."""
    two, value = torch.arange(65536), float8_values(code, dtype, torch.device("cpu"))
    pairs = torch.stack([value[two & 255], value[two >> 8]], -1)
    return pairs.view(_JOINT[dtype.itemsize]).view(-1).to(device)


def look_up(codes: Tensor, table: Tensor, out: Tensor) -> None:
    """Writes the table's entries for `codes`, unsigned integers, to `out`, which is contiguous and holds as many."""
    index = torch.empty(codes.shape, dtype=torch.int32, device=codes.device).copy_(codes)
    torch.index_select(table, 0, index.view(-1), out=out.view(-1).view(table.dtype))
