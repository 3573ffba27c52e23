"""Tables that turn packed codes into numbers, two at a time.

A look-up with 32-bit indices is the quickest portable way to expand codes of 4 and 8 bits: a table entry holds two
numbers, and is copied as one integer of their joint width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from model.transfers import to_device

_JOINT = {2: torch.int32, 4: torch.int64}
"""The integer as wide as two numbers, by the bytes of one."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of e2m1, by code."""

INT4 = tuple(float(code - 8) for code in range(16))
"""Integers that are stored with 8 added to them."""


@functools.cache
def nibble_pairs(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of pairs, as `pairs_by_byte` makes it of these values, in `dtype`."""
    return to_device(pairs_by_byte(torch.tensor(values, dtype=dtype)), device)


def pairs_by_byte(values: Tensor, *, is_high_first: bool = False) -> Tensor:
    """Values (16,) by code -> a table (256,) by byte: of its low four bits and its high ones, as one integer."""
    byte = torch.arange(256, device=values.device)
    low, high = values[byte & 15], values[byte >> 4]
    return _joined(*((high, low) if is_high_first else (low, high)))


@functools.cache
def float8_values(code: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table (256,) in `dtype` of the values of `code`, a type of 8 bits."""
    return to_device(torch.arange(256, dtype=torch.uint8).view(code).to(torch.float32).to(dtype), device)


@functools.cache
def float8_pairs(code: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table (65536,) of pairs in `dtype`: the value of the first of two bytes, then that of the second."""
    two, value = torch.arange(65536), float8_values(code, dtype, torch.device("cpu"))
    return to_device(_joined(value[two & 255], value[two >> 8]), device)


def look_up(codes: Tensor, table: Tensor, out: Tensor) -> None:
    """Writes the table's entries for `codes`, unsigned integers, to `out`, which is contiguous and holds as many."""
    index = torch.empty(codes.shape, dtype=torch.int32, device=codes.device).copy_(codes)
    torch.index_select(table, 0, index.view(-1), out=out.view(-1).view(table.dtype))


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Pairs of numbers (n,), each as one integer of their joint width."""
    return torch.stack([first, second], -1).view(_JOINT[first.dtype.itemsize]).view(-1)
