"""Signed bytes with the largest magnitude of each row, as LLM.int8 stores weights: w = q * absmax / 127."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.quantization.form import StoredMatrix, Weight
from model.quantization.pieces import through_float32
from model.simd.layouts import Integers, Numbers, Scales
from model.simd.products import Operand

_ONE_127TH = 7.874015718698502e-3


class Int8RowsMatrix(StoredMatrix):
    """Codes int8 (C_out, C_in) and largest magnitudes float32 (C_out,). See https://arxiv.org/abs/2208.07339."""

    codes: Tensor
    absmax: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor) -> None:
        super().__init__(*codes.shape)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)

    def operand(self) -> Operand | None:
        layout = Integers(8, 0, Scales(Numbers("float32"), 0), factor=_ONE_127TH)
        return Operand(layout, (self.codes, self.absmax), self.shape)

    def expand(self, rows: slice | Tensor, out: Tensor) -> None:
        codes, absmax = self.codes[rows], self.absmax[rows].unsqueeze(1)

        def fill(here: slice, into: Tensor) -> None:
            into.copy_(codes[here]).mul_(absmax[here]).mul_(_ONE_127TH)  # in bitsandbytes' order

        through_float32(out, fill)


@dataclass(frozen=True)
class Int8Rows:
    """Tensors by role: weight int8 (C_out, C_in) and absmax float32 (C_out,)."""

    @property
    def label(self) -> str:
        return "int8 (per channel)"

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        return Int8RowsMatrix(tensors["weight"], tensors["absmax"].to(torch.float32))
