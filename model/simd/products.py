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
from model.simd.words import INPUT

if TYPE_CHECKING:
    from model.simd.engine import Engine

SHARES = 4
"""Parts of a thread's work, which others take over where a thread is held up."""

FEW_ROWS = 8
"""A product with more rows than this is not taken: weights would be decoded more than once, and a tile serves all."""

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
    """Whether there is code for it here, and the matrix is large enough for that to be made for it alone."""
    return operand.shape[0] * operand.shape[1] >= SMALLEST and has_code(operand)


def has_code(operand: Operand) -> bool:
    c_out, c_in = operand.shape
    step = operand.layout.step
    are_rows = (t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 for t in operand.tensors)
    return (
        step % LANES == 0
        and c_in % step == 0
        and (c_out % LANES == 0 or not isinstance(operand.layout, Columns))
        and all(tensor.device.type == "cpu" for tensor in operand.tensors)
        and all(are_rows)
        and find_engine() is not None
    )


def product(operand: Operand, x: Tensor) -> Tensor:
    """x (N, C_in), N at most FEW_ROWS -> (N, C_out), computed in float32 and rounded to x's dtype.

    The operand is readable.
    """
    c_out, _ = operand.shape
    wide = x.to(torch.float32).contiguous()
    out = torch.empty(len(x), c_out)
    engine = find_engine()
    assert engine is not None
    if len(x):
        operation = (engine.product(operand.layout), c_out, 0, LANES, shares(operand.layout), 0)
        engine.run_alone(operation, product_arguments(operand, wide, out), len(x))
    return out.to(x.dtype)


def shares(layout: Layout) -> int:
    """Parts of each thread's work: parts of columns would be short runs of memory."""
    return 1 if isinstance(layout, Columns) else SHARES


_ZERO, _ONE = torch.zeros(1), torch.ones(1)


def product_arguments(
    operand: Operand,
    x: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    sums: Tensor | None = None,
) -> list[int]:
    """Arguments of a layout's product: x (N, C_in), out, what is added, and a Columns layout's sums (N, C_out), which
    may be `out` unless that is what is added; the bias (C_out,). All float32 and contiguous along the rows.
    """
    arguments = [operand.shape[1] // operand.layout.step, *rows(x), *rows(out)]
    arguments += [_ZERO.data_ptr(), 0] if bias is None else [bias.data_ptr(), 4]
    arguments += [_ZERO.data_ptr(), 0, 0] if added is None else [*rows(added), 4]
    arguments += rows(out if sums is None else sums)
    return [*arguments, *weight_arguments(operand)]


def weight_arguments(operand: Operand) -> list[int]:
    """The last ones of these, which say where the weights are."""
    factor = operand.factor if operand.factor is not None else _ONE
    arguments = [factor.data_ptr(), 4 if factor.numel() > 1 else 0]
    for tensor in operand.tensors:
        arguments += rows(tensor)
    return arguments


def expand(operand: Operand, here: slice, out: Tensor) -> bool:
    """Writes these rows (n, C_in) to `out` in its dtype; False: there is no code. The operand is readable."""
    if isinstance(operand.layout, Columns) or out.stride(1) != 1:
        return False
    engine = find_engine()
    assert engine is not None
    arguments = product_arguments(operand, out, out)
    arguments[INPUT] = here.start
    function = engine.expansion(operand.layout, dtype_name(out.dtype))
    engine.run_alone((function, here.stop - here.start, 0, LANES, SHARES, 0), arguments)
    return True


def rows(tensor: Tensor) -> list[int]:
    """Address and bytes from one row to the next."""
    return [tensor.data_ptr(), tensor.stride(0) * tensor.element_size() if tensor.dim() else 0]


@functools.cache
def find_engine() -> Engine | None:
    """None where llvmlite is not installed, cannot be loaded, or knows a processor that this package does not."""
    if importlib.util.find_spec("llvmlite") is None or platform.machine() not in TABLE_LOOK_UPS:
        return None
    try:
        from model.simd.engine import engine

        return engine()
    except (ImportError, OSError, RuntimeError):  # another LLVM in the process, or no memory that may be executed
        return None
