"""Weights in their stored forms, times a few rows or expanded, by vector code; where that is not to be had, not at all.

Which of both ways a product takes depends on what is installed, on the form and on the shape, never on a measurement.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.simd.layouts import LANES, TABLE_LOOK_UPS, Columns, Layout, Numbers, Plain

if TYPE_CHECKING:
    from model.simd.engine import Engine

SHARES = 4
"""Parts of a thread's work, which others take over where a thread is held up."""

FEW_ROWS = 8
"""A product with more rows than this is not taken: their sums would not fit into registers, and a tile serves all."""

SMALLEST = 2**18
"""Weights of the smallest matrix that code is compiled for, which takes as long as reading some 10^8 weights."""


@dataclass(frozen=True)
class Operand:
    """A matrix (C_out, C_in) as vector code reads it: its layout, and the layout's tensors, 1-D or 2-D.

    Results of a Columns layout are multiplied by `factor` (C_out,) or (), if there is one.
    """

    layout: Layout
    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    factor: Tensor | None = None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain_operand(weight: Tensor) -> Operand | None:
    """A matrix (C_out, C_in) of 16-bit or float32 numbers, perhaps a transposed view."""
    numbers = Numbers(dtype_name(weight.dtype))
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if weight.stride(1) == 1:
        return Operand(Plain(numbers), (weight,), weight.shape)
    return Operand(Columns(numbers), (weight.t(),), weight.shape) if weight.stride(0) == 1 else None


def is_readable(operand: Operand) -> bool:
    """Whether there is code for it here."""
    c_out, c_in = operand.shape
    step = operand.layout.step
    are_rows = (t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 for t in operand.tensors)
    return (
        c_out * c_in >= SMALLEST
        and step % LANES == 0
        and c_in % step == 0
        and (c_out % LANES == 0 or not isinstance(operand.layout, Columns))
        and all(tensor.device.type == "cpu" for tensor in operand.tensors)
        and all(are_rows)
        and _engine() is not None
    )


def product(operand: Operand, x: Tensor) -> Tensor:
    """x (N, C_in), N at most FEW_ROWS -> (N, C_out), computed in float32 and rounded to x's dtype.

    The operand is readable.
    """
    c_out, _ = operand.shape
    rows = x.to(torch.float32).contiguous()
    out = torch.empty(len(x), c_out)
    engine = _engine()
    assert engine is not None
    shares = 1 if isinstance(operand.layout, Columns) else SHARES  # parts of columns would be short runs of memory
    if len(x):
        engine.product(operand.layout, len(x))(_arguments(operand, rows, out), 0, c_out, shares)
    if operand.factor is not None:
        out.mul_(operand.factor)
    return out.to(x.dtype)


def expand(operand: Operand, rows: slice, out: Tensor) -> bool:
    """Writes rows (n, C_in) to `out` in its dtype; False: there is no code. The operand is readable."""
    if isinstance(operand.layout, Columns) or out.stride(1) != 1:
        return False
    engine = _engine()
    assert engine is not None
    function = engine.expansion(operand.layout, dtype_name(out.dtype))
    arguments = _arguments(operand, out, out)
    arguments[1] = rows.start
    function(arguments, rows.start, rows.stop, SHARES)
    return True


def _arguments(operand: Operand, x: Tensor, out: Tensor) -> list[int]:
    arguments = [operand.shape[1] // operand.layout.step]
    for tensor in (x, out, *operand.tensors):
        stride = tensor.stride(0) * tensor.element_size() if tensor.dim() else 0
        arguments += [tensor.data_ptr(), stride]
    return arguments


@functools.cache
def _engine() -> Engine | None:
    """None where llvmlite is not installed, cannot be loaded, or knows a processor that this package does not."""
    if importlib.util.find_spec("llvmlite") is None or platform.machine() not in TABLE_LOOK_UPS:
        return None
    try:
        from model.simd.engine import engine

        return engine()
    except (ImportError, OSError, RuntimeError):  # another LLVM in the process, or no memory that may be executed
        return None
