"""Affine groups are expanded as MLX itself does: bit for bit in float32, within its double rounding in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.quantization.mlx_affine import BITS, GROUP_SIZES, MlxAffineMatrix, unpack

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from support.mlx_arrays import from_torch, to_torch  # noqa: E402

ROWS, WIDTH = 7, 384


def quantized(bits: int, group_size: int, dtype: torch.dtype) -> tuple[MlxAffineMatrix, Tensor, Tensor]:
    """The matrix, and MLX's dequantization of it in float32 and in `dtype`."""
    generator = torch.Generator().manual_seed(bits)
    weight = (0.3 * torch.randn(ROWS, WIDTH, generator=generator)).to(dtype)
    arrays = mx.quantize(from_torch(weight), group_size=group_size, bits=bits)
    wide = (arrays[0], arrays[1].astype(mx.float32), arrays[2].astype(mx.float32))
    expected = [to_torch(mx.dequantize(*each, group_size=group_size, bits=bits)) for each in (wide, arrays)]
    words, scales, biases = map(to_torch, arrays)
    return MlxAffineMatrix(words.view(torch.uint8), scales, biases, bits), expected[0], expected[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_values_are_those_of_mlx(bits: int, group_size: int, dtype: torch.dtype) -> None:
    matrix, exact, rounded = quantized(bits, group_size, dtype)
    assert matrix.shape == (ROWS, WIDTH) and torch.equal(matrix.expanded(), exact)
    ours = matrix.expanded(dtype)
    assert torch.equal(ours, exact.to(dtype))
    codes = torch.empty(ROWS, WIDTH)
    unpack(matrix.codes, bits, codes)
    groups = codes.to(dtype).view(ROWS, -1, group_size)
    products = groups * matrix.scales.unsqueeze(-1)  # rounded, and rounded again with the sum, as MLX does
    assert torch.equal((products + matrix.biases.unsqueeze(-1)).view(ROWS, WIDTH), rounded)
    unit = torch.finfo(dtype).eps / 2
    limit = unit * (products.float().abs().view(ROWS, WIDTH) + 2 * exact.abs()) * 1.01
    assert ((ours.float() - rounded.float()).abs() <= limit).all()


@pytest.mark.parametrize("bits", BITS)
def test_rows_tiles_and_products(bits: int) -> None:
    matrix, exact, _ = quantized(bits, 64, torch.bfloat16)
    chosen = torch.tensor([5, 0, 5])
    assert torch.equal(matrix.rows(chosen.view(3, 1), torch.float32), exact[chosen].view(3, 1, WIDTH))
    assert torch.equal(matrix.tile(slice(2, 6), torch.bfloat16), exact[2:6].bfloat16())
    turned = torch.empty(WIDTH, 3).t()
    matrix.expand(slice(1, 4), turned)
    assert torch.equal(turned, exact[1:4])
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(matrix.product(x), x @ exact.t())


def test_codes_are_a_stream_of_bits() -> None:
    """By hand: 6-bit codes straddle bytes, low bits first."""
    codes = torch.tensor([[1, 2, 3, 4, 61, 62, 63, 0]])
    stream = sum(int(code) << 6 * place for place, code in enumerate(codes[0]))
    packed = torch.tensor([list(stream.to_bytes(6, "little"))], dtype=torch.uint8)
    found = torch.empty(1, 8)
    unpack(packed, 6, found)
    assert torch.equal(found, codes.float())
