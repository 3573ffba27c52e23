"""MLX's affine groups: w = q * s + b, with codes of 2 to 8 bits as one little-endian stream of bits a row.

Knows the arithmetic; names and files belong to model.weights.mlx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.quantization.form import StoredMatrix, Weight
from model.quantization.pieces import through_float32
from model.quantization.tables import look_up, nibble_pairs
from model.simd.layouts import Affine, Numbers, Scales
from model.simd.products import Operand, dtype_name

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


_UNSIGNED = tuple(float(code) for code in range(16))


class MlxAffineMatrix(StoredMatrix):
    """Codes as bytes (C_out, C_in * bits / 8); scales and biases (C_out, C_in / group) in a floating-point dtype.

    MLX itself rounds the product and the sum, each to the scales' dtype. Here both are float32 and only the result is
    rounded, so values in 16 bits differ from MLX's by its roundings; in float32 they are equal.
    """

    codes: Tensor
    scales: Tensor
    biases: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, biases: Tensor, bits: int) -> None:
        super().__init__(len(codes), codes.shape[1] * 8 // bits)
        self.bits = bits
        for name, tensor in (("codes", codes), ("scales", scales), ("biases", biases)):
            self.register_buffer(name, tensor, persistent=False)

    def operand(self) -> Operand | None:
        if self.bits not in (4, 8):
            return None
        group = self.in_features // self.scales.shape[1]
        layout = Affine(self.bits, Scales(Numbers(dtype_name(self.scales.dtype)), group))
        return Operand(layout, (self.codes, self.scales, self.biases), self.shape)

    def expand(self, rows: slice | Tensor, out: Tensor) -> None:
        codes, scales, biases = self.codes[rows], self.scales[rows], self.biases[rows]

        def fill(here: slice, into: Tensor) -> None:
            unpack(codes[here], self.bits, into)
            groups = into.unflatten(1, (scales.shape[1], -1))
            groups.mul_(scales[here].float().unsqueeze(-1)).add_(biases[here].float().unsqueeze(-1))

        through_float32(out, fill)


def unpack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Bytes (n, C * bits / 8) -> their unsigned codes as numbers in `out` (n, C), float32 and contiguous.

    C is a multiple of 8, so that 8 codes, which fill `bits` bytes, begin at a byte.
    """
    if bits == 8:
        out.copy_(codes)
    elif bits == 4:
        look_up(codes, nibble_pairs(_UNSIGNED, out.dtype, codes.device), out)
    else:
        packed, numbers = codes.unflatten(1, (-1, bits)), out.unflatten(1, (-1, 8))
        for i in range(8):
            byte, shift = divmod(i * bits, 8)
            window = packed[..., byte].to(torch.int32)
            if shift + bits > 8:
                window |= packed[..., byte + 1].to(torch.int32) << 8
            numbers[..., i] = window.bitwise_right_shift_(shift).bitwise_and_(2**bits - 1)


@dataclass(frozen=True)
class MlxAffine:
    """Tensors by role: weight uint32 (C_out, C_in * bits / 32), scales and biases (C_out, C_in / group_size)."""

    bits: int
    group_size: int

    @property
    def label(self) -> str:
        return f"int{self.bits} (affine, groups of {self.group_size})"

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        codes = tensors["weight"].view(torch.uint8)  # little-endian, as in the file
        return MlxAffineMatrix(codes, tensors["scales"], tensors["biases"], self.bits)
