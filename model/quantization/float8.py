"""FP8 codes (e4m3) with a scale a tensor, row, group or block: w = q * scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.gpu.forms import CODES
from model.quantization.form import Weight
from model.quantization.scaled import Grain, ScaledMatrix
from model.quantization.tables import float8_pairs, float8_values, look_up
from model.simd.layouts import Columns, Float8, Numbers
from model.simd.products import Operand


@dataclass(frozen=True)
class Float8Scheme:
    """Roles: "codes" float8_e4m3fn (C_out, C_in), or (C_in, C_out) if transposed, and "scale"."""

    grain: Grain
    is_transposed: bool = False

    @property
    def label(self) -> str:
        return f"FP8 ({self.grain.label})"

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        codes, scale = tensors["codes"], tensors["scale"]
        if self.grain.rows == 1 and not self.grain.columns:
            scale = scale.reshape(-1)  # fused layouts have (1, C_out), too
        return Float8Matrix(codes, scale, self.grain, self.is_transposed)


class Float8Matrix(ScaledMatrix):
    """Codes (C_out, C_in), or (C_in, C_out) if transposed."""

    def __init__(self, codes: Tensor, scale: Tensor, grain: Grain, is_transposed: bool = False) -> None:
        shape = codes.t().shape if is_transposed else codes.shape
        super().__init__(codes.view(torch.uint8), scale, (shape[0], shape[1]), grain)
        self.kind = codes.dtype
        self.is_transposed = is_transposed

    def operand(self) -> Operand | None:
        if self.kind != torch.float8_e4m3fn:
            return None
        if not self.is_transposed:
            return Operand(Float8(self.scale_layout()), (self.codes, self.scale), self.shape)
        if self.grain.columns or self.grain.rows > 1:
            return None
        return Operand(Columns(Numbers("float8_e4m3fn")), (self.codes,), self.shape, self.scale.float().view(-1))

    def codes_on_gpu(self) -> tuple[int, Tensor] | None:
        return None if self.kind != torch.float8_e4m3fn else (CODES, self.codes.view(self.kind))

    def decode(self, rows: slice | Tensor, out: Tensor) -> None:
        codes = self.codes[:, rows] if self.is_transposed else self.codes[rows]
        out = out.t() if self.is_transposed else out
        if out.shape[1] % 2 or codes.storage_offset() % 2 or self.codes.shape[1] % 2:
            look_up(codes, float8_values(self.kind, out.dtype, out.device), out)
        else:  # two codes at a time are twice as quick
            look_up(codes.view(torch.uint16), float8_pairs(self.kind, out.dtype, out.device), out)
