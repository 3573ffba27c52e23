"""Weights that compressed-tensors stored expand to what it dequantizes, bit for bit, in whole and in part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.quantization.form import StoredMatrix
from model.weights import compressed_tensors
from support.compressed import RECIPES, Recipe, compressed, dequantized, in_float32
from support.groups_in_memory import built, read_by

SHAPE = (42, 96)
LABELS = {
    "w4a16": "w4a16 (int4, groups of 16)",
    "w4a16_asym": "w4a16 (int4, groups of 16, with zero points)",
    "w4a16_channel": "w4a16 (int4, per channel)",
    "w8a16": "w8a16 (int8, groups of 16)",
    "int8": "int8 (per channel)",
    "int8_tensor": "int8 (per tensor)",
    "fp8_dynamic": "FP8 (per channel)",
    "fp8_tensor": "FP8 (per tensor)",
    "fp8_block": "FP8 (blocks of 16 x 8)",
    "nvfp4": "NVFP4 (groups of 16)",
    "mxfp4": "MXFP4 (groups of 32)",
}
PER_CHANNEL = [name for name, recipe in RECIPES.items() if recipe.weights["strategy"] in ("channel", "tensor")]


def case(name: str, shape: tuple[int, int] = SHAPE) -> tuple[dict[str, Tensor], Recipe]:
    """The stored tensors of a random weight, whose outliers make scales differ, by `.weight_scale` and so on."""
    recipe = RECIPES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)) ** 3
    return compressed(recipe, weight), recipe


def stored(name: str, shape: tuple[int, int] = SHAPE) -> tuple[StoredMatrix, dict[str, Tensor], Recipe]:
    tensors, recipe = case(name, shape)
    named = {f".{key}": tensor for key, tensor in tensors.items()}
    source = read_by(compressed_tensors.read, named, shape, recipe.settings())
    assert source.shape == shape
    return built(source, named), tensors, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_it_expands_to_what_the_library_dequantizes(name: str) -> None:
    matrix, tensors, recipe = stored(name)
    expected, exact = dequantized(recipe, tensors), in_float32(recipe, tensors)
    assert matrix.shape == SHAPE and torch.equal(matrix.expanded(expected.dtype), expected)
    assert torch.equal(matrix.expanded(), exact)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(matrix.expanded(dtype), exact.to(dtype))


@pytest.mark.parametrize("name", RECIPES)
def test_parts_are_those_of_the_whole(name: str) -> None:
    matrix, _, _ = stored(name)
    indices = torch.tensor([[41, 0, 7], [7, 8, 40]])
    for dtype in (torch.float32, torch.bfloat16):
        whole = matrix.expanded(dtype)
        assert torch.equal(matrix.rows(indices, dtype), whole[indices])
        for rows in (slice(0, 1), slice(5, 22), slice(16, 42), slice(41, 42)):
            assert torch.equal(matrix.tile(rows, dtype), whole[rows])
            transposed = torch.empty(SHAPE[1], rows.stop - rows.start, dtype=dtype).t()
            matrix.expand(rows, transposed)
            assert torch.equal(transposed, whole[rows])


@pytest.mark.parametrize("name", RECIPES)
def test_products_are_those_of_the_dequantized_weights(name: str) -> None:
    matrix, _, _ = stored(name)
    x = torch.randn(2, 3, SHAPE[1])
    expected = x.double() @ matrix.expanded().double().t()
    assert (matrix.product(x) - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", PER_CHANNEL)
@pytest.mark.parametrize("columns", [42, 7])
def test_rows_that_do_not_fill_their_words(name: str, columns: int) -> None:
    matrix, tensors, recipe = stored(name, (11, columns))
    assert torch.equal(matrix.expanded(), in_float32(recipe, tensors))
    assert torch.equal(matrix.expanded(torch.bfloat16), in_float32(recipe, tensors).bfloat16())
    assert torch.equal(matrix.tile(slice(3, 8), torch.float32), matrix.expanded()[3:8])


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    tensors, recipe = case(name)
    named = {f".{key}": tensor for key, tensor in tensors.items()}
    assert read_by(compressed_tensors.read, named, SHAPE, recipe.settings()).scheme.label == LABELS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_copied(name: str) -> None:
    """Weights stay where the file is mapped."""
    matrix, tensors, _ = stored(name)
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert {buffer.untyped_storage().data_ptr() for buffer in matrix.buffers()} <= places


def test_codes_of_fp8_that_are_not_numbers_stay_so() -> None:
    tensors, recipe = case("fp8_tensor")
    tensors["weight"].view(torch.uint8)[3, 4:6] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    named = {f".{key}": tensor for key, tensor in tensors.items()}
    matrix = built(read_by(compressed_tensors.read, named, SHAPE, recipe.settings()), named)
    assert matrix.expanded().isnan().nonzero().tolist() == [[3, 4], [3, 5]]
