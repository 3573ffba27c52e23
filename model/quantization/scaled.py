"""What forms with scales have in common: codes that are multiplied by one scale a tensor, row, group or block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.gpu.forms import LEAST_GROUP, WHOLE, Form
from model.quantization.form import StoredMatrix
from model.quantization.tables import float8_values, look_up
from model.simd.layouts import Numbers, Scales
from model.simd.products import dtype_name


@dataclass(frozen=True)
class Grain:
    """How many rows and columns of a matrix (C_out, C_in) share a scale; 0 stands for all of them."""

    rows: int
    columns: int

    @property
    def label(self) -> str:
        """For people, such as "groups of 128"."""
        if self.rows > 1:
            return f"blocks of {self.rows} x {self.columns}"
        if self.columns:
            return f"groups of {self.columns}"
        return "per channel" if self.rows else "per tensor"


PER_TENSOR, PER_CHANNEL = Grain(0, 0), Grain(1, 0)


class ScaledMatrix(StoredMatrix):
    """Codes and their scales (rows of scales, columns of scales); subclasses say what the codes mean.

    Scales are float32, 16-bit, e4m3, or uint8: exponents of two with 127 added, as MX formats have them. A scale for
    each row may be (C_out,), one for the whole matrix () or (1,).
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, shape: tuple[int, int], grain: Grain) -> None:
        super().__init__(*shape)
        self.grain = grain
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale if scale.dim() == 2 else scale.view(-1, 1), persistent=False)

    def scale_layout(self) -> Scales:
        """How the scales lie in memory."""
        return Scales(Numbers(dtype_name(self.scale.dtype)), self.grain.columns, self.grain.rows)

    def form(self) -> Form | None:
        (n, k), columns, scale = self.shape, self.grain.columns, self.scale
        found = self.codes_on_gpu()
        if found is None or self.grain.rows > 1 or not scale.is_floating_point() or scale.element_size() == 1:
            return None
        if columns and (columns % LEAST_GROUP or k % columns):
            return None
        kind, codes = found
        strides = (codes.stride(1), codes.stride(0)) if self.is_transposed else (codes.stride(0), codes.stride(1))
        scale_strides = (scale.stride(0) if len(scale) > 1 else 0, scale.stride(1) if columns else 0)
        return Form(kind, columns or WHOLE, (n, k), codes, scale, strides, scale_strides)

    def codes_on_gpu(self) -> tuple[int, Tensor] | None:
        """Their kind, and they in a dtype that kernels for GPUs read; None if there are none for them."""
        return None

    def expand(self, rows: slice | Tensor, out: Tensor) -> None:
        scale = self.scales(rows)
        if scale.dtype != out.dtype:  # a product in the narrower dtype would round twice, one of both be slow
            scale = scale.float()
        work = out if scale.dtype == out.dtype and self._is_direct(out) else self._empty(out.shape, scale)
        self.decode(rows, work)
        self.by_group(Tensor.mul_, work, scale)
        if work is not out:
            out.copy_(work)

    def decode(self, rows: slice | Tensor, out: Tensor) -> None:
        """Writes the rows' codes as numbers to `out` (n, C_in): contiguous, or transposed where the codes are."""
        raise NotImplementedError

    def scales(self, rows: slice | Tensor) -> Tensor:
        """Scales (n or 1, columns of scales) of rows, as numbers."""
        if self.scale.dtype == torch.float8_e4m3fn:
            return _float8(self.of_rows(self.scale.view(torch.uint8), rows), torch.float8_e4m3fn)
        scale = self.of_rows(self.scale, rows)
        return _float8(scale, torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale

    def of_rows(self, values: Tensor, rows: slice | Tensor) -> Tensor:
        """Of values with a row for each row of scales, those (n or 1, ...) that apply to rows of the matrix."""
        if len(values) == 1:
            return values
        if self.grain.rows == 1:
            return values[rows]
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=values.device)
        return values[rows // self.grain.rows]

    def by_group(self, operation: Callable[[Tensor, Tensor], Tensor], numbers: Tensor, values: Tensor) -> None:
        """Applies an in-place operation to numbers (n, C_in) and the values (n or 1, columns) of their groups."""
        columns, size = values.shape[1], self.grain.columns
        if columns == 1:
            operation(numbers, values)
        elif columns * size == self.in_features:
            operation(numbers.unflatten(1, (columns, size)), values.unsqueeze(-1))
        else:
            operation(numbers, values.repeat_interleave(size, 1)[:, : self.in_features])

    def _is_direct(self, out: Tensor) -> bool:
        return (out.t() if self.is_transposed else out).is_contiguous() and out.storage_offset() % 2 == 0

    def _empty(self, shape: torch.Size, like: Tensor) -> Tensor:
        return like.new_empty(shape[::-1]).t() if self.is_transposed else like.new_empty(shape)


def _float8(codes: Tensor, kind: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    look_up(codes, float8_values(kind, torch.float32, codes.device), out)
    return out
