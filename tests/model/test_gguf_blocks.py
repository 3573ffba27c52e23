"""Weights in GGUF's blocks against the package gguf: the same numbers, bit for bit."""

from __future__ import annotations

import warnings

import gguf
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor

from model.quantization.gguf_blocks import GgufMatrix, GgufScheme
from model.quantization.gguf_types import BY_LIBRARY, BY_NAME, BY_NUMBER, NATIVE, PLAIN, BlockType

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
    torch.manual_seed(1)
    blocks = random_blocks(kind, 1237, 512)
    matrix = built(blocks, kind, 512)
    assert matrix.shape == (1237, 512) and GgufScheme(kind.name).label == kind.name
    assert_same(matrix.expanded(torch.float32), by_library(blocks, kind))
