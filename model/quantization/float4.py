"""FP4 codes (e2m1) with a scale a group and, in NVFP4, one for the whole matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from model.quantization.form import Weight
from model.quantization.scaled import Grain, ScaledMatrix
from model.quantization.tables import FP4, look_up, nibble_pairs
from model.simd.layouts import Float4
from model.simd.products import Operand


@dataclass(frozen=True)
class Float4Scheme:
    """Roles: "codes" uint8 (C_out, C_in / 2), the first code in the low bits; "scale" (C_out, groups), "global" (1,).

    If transposed: codes (C_in / 2, C_out), so that a byte's codes are of one column, and scale (groups, C_out). Tools
    differ in what the global scale is: w = q * (scale / global), or w = q * (scale * global). MXFP4 has none.
    """

    group_size: int
    divides: bool = False
    has_global: bool = True
    is_transposed: bool = False

    @property
    def label(self) -> str:
        return f"{'NVFP4' if self.has_global else 'MXFP4'} (groups of {self.group_size})"

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        return Float4Matrix(tensors["codes"], tensors["scale"], self, tensors.get("global"))


class Float4Matrix(ScaledMatrix):
    """See Float4Scheme. Codes that are stored transposed are expanded to rows all the same."""

    factor: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, scheme: Float4Scheme, factor: Tensor | None = None) -> None:
        if scheme.is_transposed:
            codes, scale = codes.t(), scale.t()
        super().__init__(codes, scale, (codes.shape[0], codes.shape[1] * 2), Grain(1, scheme.group_size))
        self.scheme = scheme
        self.register_buffer("factor", None if factor is None else factor.view(1, 1), persistent=False)

    def operand(self) -> Operand | None:
        if self.scheme.is_transposed:
            return None
        divides = None if self.factor is None else self.scheme.divides
        tensors = (self.codes, self.scale) if self.factor is None else (self.codes, self.scale, self.factor)
        return Operand(Float4(self.scale_layout(), divides), tensors, self.shape)

    def scales(self, rows: slice | Tensor) -> Tensor:
        scale = super().scales(rows)
        if self.factor is None:
            return scale
        return scale / self.factor if self.scheme.divides else scale * self.factor

    def decode(self, rows: slice | Tensor, out: Tensor) -> None:
        look_up(self.codes[rows], nibble_pairs(FP4, out.dtype, out.device), out)
