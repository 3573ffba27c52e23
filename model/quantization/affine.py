"""Integer codes of 4 or 8 bits with a scale, and perhaps a zero point, a tensor, row or group: w = (q - z) * scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.gpu.forms import CODES, INT4_WORDS
from model.quantization.form import Weight
from model.quantization.scaled import Grain, ScaledMatrix
from model.quantization.tables import INT4, look_up, nibble_pairs
from model.simd.layouts import Integers
from model.simd.products import Operand


@dataclass(frozen=True)
class AffineScheme:
    """Roles: "codes", "scale" and, if there are zero points, "zero".

    Packed codes (C_out, words) and zero points (words, groups) are int32 words of unsigned codes, to which half their
    range is added, the first in the low bits; packed along C_in and C_out. Otherwise both are int8.
    """

    bits: int  # 4 or 8
    grain: Grain
    is_packed: bool = True
    has_zero: bool = False

    @property
    def label(self) -> str:
        zero = ", with zero points" if self.has_zero else ""
        inner = f"{self.grain.label}{zero}"
        return f"w{self.bits}a16 (int{self.bits}, {inner})" if self.is_packed else f"int{self.bits} ({inner})"

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        codes, scale = tensors["codes"], tensors["scale"]
        return AffineMatrix(codes, scale, (shape[0], shape[1]), self, tensors.get("zero"))


class AffineMatrix(ScaledMatrix):
    """Integer codes, as stored; see AffineScheme."""

    zero: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, shape: tuple[int, int], scheme: AffineScheme, zero: Tensor | None = None
    ) -> None:
        super().__init__(codes.view(torch.uint8) if scheme.is_packed else codes, scale, shape, scheme.grain)
        self.scheme = scheme
        self.register_buffer("zero", zero if zero is None or zero.dim() == 2 else zero.view(-1, 1), persistent=False)

    def operand(self) -> Operand | None:
        bits, is_packed = self.scheme.bits, self.scheme.is_packed
        zero = "" if self.zero is None else "packed" if self.zero.dtype == torch.int32 else "int8"
        layout = Integers(bits, 2 ** (bits - 1) if is_packed else 0, self.scale_layout(), zero)
        tensors = (self.codes, self.scale) if self.zero is None else (self.codes, self.scale, self.zero)
        return Operand(layout, tensors, self.shape)

    def codes_on_gpu(self) -> tuple[int, Tensor] | None:
        width, is_signed = self.codes.shape[1], not self.scheme.is_packed
        if self.zero is not None or (self.scheme.bits == 8 and not (is_signed and width == self.in_features)):
            return None
        if self.scheme.bits == 4 and (width * 2 != self.in_features or width % 16 or self.is_transposed):
            return None
        if self.scheme.bits == 4 and (self.codes.stride(1) != 1 or self.codes.stride(0) % 4):
            return None  # kernels read words
        return (INT4_WORDS if self.scheme.bits == 4 else CODES), self.codes

    def decode(self, rows: slice | Tensor, out: Tensor) -> None:
        codes = self.codes[rows]
        if self.scheme.bits == 4:
            width = codes.shape[1] * 2  # of whole words
            whole = out if width == self.in_features else out.new_empty(len(codes), width)
            look_up(codes, nibble_pairs(INT4, out.dtype, out.device), whole)
            if whole is not out:
                out.copy_(whole[:, : self.in_features])
        else:
            out.copy_(codes[:, : self.in_features])
            if self.scheme.is_packed:
                out.sub_(128)
        if self.zero is not None:
            self.by_group(Tensor.sub_, out, self._zero_points(self.zero, rows).to(out.dtype))

    def _zero_points(self, zero: Tensor, rows: slice | Tensor) -> Tensor:
        """Zero points (n or 1, groups) of rows."""
        if zero.dtype != torch.int32:
            return self.of_rows(zero, rows)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=zero.device)
        bits = self.scheme.bits
        shifts = (rows % (32 // bits) * bits).to(torch.int32).unsqueeze(1)
        return (zero[rows // (32 // bits)] >> shifts & 2**bits - 1) - 2 ** (bits - 1)
