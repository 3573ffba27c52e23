"""NF4, FP4 and LLM.int8 matrices are expanded as bitsandbytes itself does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.quantization.int8_rows import Int8RowsMatrix
from model.quantization.table4 import BlockScales, DoubleQuantization, Table4, Table4Matrix

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

KINDS = ("nf4", "fp4")
SHAPES = ((7, 192), (22, 42), (5, 33), (300, 64))  # whole blocks, blocks across rows, bytes across rows, many blocks


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """bitsandbytes compiles its operators for each shape, with a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quantized(kind: str, shape: tuple[int, int], is_double: bool, block: int = 64) -> tuple[Table4Matrix, Tensor]:
    """The matrix, and its float32 dequantization by bitsandbytes."""
    weight = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    codes, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=is_double, quant_type=kind)
    tensors, double = {"weight": codes, "quant_map": state.code, "absmax": state.absmax}, None
    if is_double:
        tensors |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
        double = DoubleQuantization(state.state2.blocksize, state.offset.item())
    matrix = Table4(kind, block, double).build(tensors, shape)
    assert isinstance(matrix, Table4Matrix)
    return matrix, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_bitsandbytes(kind: str, shape: tuple[int, int], is_double: bool) -> None:
    matrix, expected = quantized(kind, shape, is_double)
    assert matrix.shape == shape and torch.equal(matrix.expanded(), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(matrix.expanded(dtype), expected.to(dtype))
    chosen = torch.tensor([4, 0, 4])
    assert torch.equal(matrix.rows(chosen, torch.float32), expected[chosen])
    assert torch.equal(matrix.tile(slice(1, 5), torch.float32), expected[1:5])
    turned = torch.empty(shape[1], 3).t()
    matrix.expand(slice(2, 5), turned)
    assert torch.equal(turned, expected[2:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_in_16_bits_are_those_of_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    weight = 0.3 * torch.randn(7, 192, generator=torch.Generator().manual_seed(3)).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type=kind)
    scales = BlockScales(state.absmax, None, None, None)
    matrix = Table4Matrix((7, 192), codes.flatten(), state.code, scales, 64)
    assert torch.equal(matrix.expanded(dtype), functional.dequantize_4bit(codes, state))


def test_other_block_sizes_and_products() -> None:
    for block in (32, 128, 256):
        matrix, expected = quantized("nf4", (6, 256), True, block)
        assert torch.equal(matrix.expanded(), expected)
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(block))
        torch.testing.assert_close(matrix.product(x), x @ expected.t())


def test_int8_rows_are_those_of_bitsandbytes() -> None:
    weight = torch.randn(11, 42, generator=torch.Generator().manual_seed(2)).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(weight)
    matrix, expected = Int8RowsMatrix(codes, absmax), functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(matrix.expanded(), expected)
    assert torch.equal(matrix.rows(torch.tensor([3, 1]), torch.bfloat16), expected[[3, 1]].bfloat16())
