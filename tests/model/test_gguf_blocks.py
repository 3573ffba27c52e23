"""Weights in GGUF's blocks against the package gguf: the same numbers, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from torch import Tensor

from model.errors import CheckpointError
from model.quantization.gguf_blocks import GgufMatrix, GgufScheme
from model.quantization.gguf_types import BY_LIBRARY, BY_NAME, BY_NUMBER, NATIVE, PLAIN, BlockType

BY_LLAMA_CPP = Path(__file__).with_name("blocks_by_llama_cpp") / "blocks.safetensors"
TYPES = pytest.mark.parametrize("kind", [*NATIVE, *BY_LIBRARY], ids=lambda kind: kind.name)


def random_blocks(kind: BlockType, rows: int, width: int) -> Tensor:
    """Any bytes: scales are also infinite, NaN, subnormal and negative."""
    return torch.randint(256, (rows, kind.row_bytes(width)), dtype=torch.uint8)


def by_library(blocks: Tensor, kind: BlockType) -> Tensor:
    with warnings.catch_warnings():  # NumPy's, of infinite scales
        warnings.simplefilter("ignore", RuntimeWarning)
        return torch.from_numpy(dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name]))


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal bits, also of zeros' signs; one NaN is as good as another."""
    bits = {2: torch.int16, 4: torch.int32}[found.itemsize]
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    is_number = ~expected.isnan()
    assert torch.equal(found[is_number].view(bits), expected[is_number].view(bits))


def built(blocks: Tensor, kind: BlockType, width: int) -> GgufMatrix:
    return GgufScheme(kind.name).build({"blocks": blocks}, (len(blocks), width))


def test_types_are_those_of_the_library() -> None:
    for kind in (*PLAIN, *NATIVE, *BY_LIBRARY):
        number = gguf.GGMLQuantizationType[kind.name]
        assert (kind.block_weights, kind.block_bytes) == gguf.GGML_QUANT_SIZES[number], kind
        assert kind.number == number and BY_NUMBER[number] is BY_NAME[kind.name] is kind


@TYPES
def test_any_bytes_expand_to_the_librarys_numbers(kind: BlockType) -> None:
    """More rows than are expanded at once, and an odd number of them."""
    torch.manual_seed(1)
    blocks = random_blocks(kind, 1237, 512)
    before = blocks.clone()
    matrix = built(blocks, kind, 512)
    assert matrix.shape == (1237, 512) and GgufScheme(kind.name).label == kind.name
    assert_same(matrix.expanded(torch.float32), by_library(blocks, kind))
    assert torch.equal(blocks, before)


@TYPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_those_of_float32_rounded_once(kind: BlockType, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    blocks = random_blocks(kind, 3, 768)
    assert_same(built(blocks, kind, 768).expanded(dtype), by_library(blocks, kind).to(dtype))


@TYPES
def test_rows_are_a_slice_or_indices(kind: BlockType) -> None:
    torch.manual_seed(3)
    blocks = random_blocks(kind, 11, 256)
    matrix, whole = built(blocks, kind, 256), by_library(blocks, kind)
    indices = torch.tensor([[10, 0, 3], [3, 7, 10]])
    assert_same(matrix.rows(indices, torch.float32), whole[indices])
    assert_same(matrix.rows(indices[:0], torch.bfloat16), whole[indices[:0]].bfloat16())
    out = torch.zeros(7, 256)
    matrix.expand(slice(4, 9), out[1:6])
    assert_same(out, torch.cat([torch.zeros(1, 256), whole[4:9], torch.zeros(1, 256)]))
    for row in range(11):  # of one row, parts that would otherwise be copied are views of the stored bytes
        before = blocks.clone()
        assert_same(matrix.rows(torch.tensor(row), torch.float32), whole[row])
        matrix.expand(slice(row, row + 1), out[:1])
        assert torch.equal(blocks, before)
        assert_same(out[0], whole[row])


@TYPES
def test_an_expert_of_a_stack_may_begin_anywhere(kind: BlockType) -> None:
    """Also at an odd byte, where no float16 can be viewed, and be written to a transposed view."""
    torch.manual_seed(4)
    stack = random_blocks(kind, 3 * 5, 512).view(3, 5, -1)
    shifted = torch.empty(stack.numel() + 1, dtype=torch.uint8)[1:].view(stack.shape).copy_(stack)
    for expert in range(3):
        expected = by_library(stack[expert], kind)
        out = torch.empty(512, 5).t()
        for blocks in (stack[expert], shifted[expert]):
            built(blocks, kind, 512).expand(slice(0, 5), out.zero_())
            assert_same(out, expected)


@pytest.mark.parametrize("kind", BY_LIBRARY, ids=lambda kind: kind.name)
def test_types_of_the_library_are_refused_without_it(kind: BlockType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=rf"^weights of type {kind.name} need .*: pip install 'l4ctx\[gguf\]'$"):
        built(random_blocks(kind, 1, 256), kind, 256)


@pytest.mark.parametrize("kind", NATIVE, ids=lambda kind: kind.name)
def test_products_are_those_of_expanded_weights(kind: BlockType) -> None:
    """Of the sizes that models have: random scales that are finite, and small."""
    torch.manual_seed(5)
    matrix = built(finite_blocks(kind, 70, 512), kind, 512)
    x = torch.randn(2, 3, 512)
    expected = x.double() @ matrix.expanded(torch.float32).double().t()
    assert expected.isfinite().all()
    torch.testing.assert_close(matrix.product(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def finite_blocks(kind: BlockType, rows: int, width: int) -> Tensor:
    """Random codes with random scales of which none is infinite."""
    blocks = random_blocks(kind, rows, width)
    if kind.name == "MXFP4":
        blocks.view(-1, 17)[:, 0] = torch.randint(110, 128, (len(blocks) * width // 32,))
        return blocks
    places = {"Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,), "Q4_1": (1, 3), "Q5_1": (1, 3)}
    for place in places.get(kind.name, (1, 3) if kind.name in ("Q4_K", "Q5_K") else (1,)):
        blocks.view(-1, kind.block_bytes)[:, place] &= 0x9F  # a high byte of float16: its exponent's top bits
    return blocks


@TYPES
def test_blocks_of_llama_cpp_are_read_as_it_reads_them(kind: BlockType) -> None:
    """They and their values in float32 were written by its quantizer: see blocks_by_llama_cpp/make.py.txt."""
    tensors = load_file(BY_LLAMA_CPP)
    original, blocks, expected = (tensors[name] for name in ("original", f"{kind.name}.blocks", f"{kind.name}.values"))
    found = built(blocks, kind, original.shape[1]).expanded(torch.float32)
    assert_same(found, expected)
    bits = 8 * kind.block_bytes / kind.block_weights
    error = (found - original).square().mean() / original.square().mean()
    assert error < 12 * 4**-bits  # rounding halves its error with each bit: these are blocks of this matrix
