"""16-bit and 32-bit weights that are computed in another dtype."""

from __future__ import annotations

from torch import Tensor

from model.quantization.form import StoredMatrix
from model.simd.products import Operand, plain_operand


class PlainMatrix(StoredMatrix):
    """Numbers (C_out, C_in) in a dtype of their own; a transposed view of (C_in, C_out) where they are stored so."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape)
        self.register_buffer("weight", weight, persistent=False)
        self.is_transposed = weight.stride(0) == 1 != weight.stride(1)

    def operand(self) -> Operand | None:
        return plain_operand(self.weight)

    def expand(self, rows: slice | Tensor, out: Tensor) -> None:
        out.copy_(self.weight[rows])
