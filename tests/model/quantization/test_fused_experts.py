"""Fused experts of modelopt and FBGEMM expand to what their formulas say, whichever way their scales are turned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.quantization.form import StoredMatrix
from model.weights import compressed_tensors, fbgemm, modelopt
from model.weights.sources import WeightSource
from support.fused_experts import fp8_per_row, nvfp4, turned
from support.groups_in_memory import built, read_by

EXPERTS, INPUTS, OUTPUTS = 5, 48, 42
PATH = "model.layers.0.feed_forward.experts.down_proj"
SETTINGS = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) ** 3


def expert(source: WeightSource, tensors: dict[str, Tensor], number: int) -> StoredMatrix:
    found = {role: tensors[tensor.name.split(PATH)[1]] for role, tensor in source.tensors.items()}
    found = {role: t[number] if t.dim() and len(t) == EXPERTS else t for role, t in found.items()}
    matrix = source.scheme.build(found, source.shape[1:])
    assert isinstance(matrix, StoredMatrix)
    return matrix


def check(source: WeightSource, tensors: dict[str, Tensor], exact: Tensor) -> None:
    """Every expert equals exact (E, C_out, C_in), in whole and in part."""
    assert source.shape == (EXPERTS, INPUTS, OUTPUTS)
    for number, expected in enumerate(exact):
        matrix = expert(source, tensors, number)
        assert matrix.shape == expected.shape
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(matrix.expanded(dtype), expected.to(dtype))
            for rows in (slice(0, OUTPUTS), slice(3, 20), slice(8, 42)):
                assert torch.equal(matrix.tile(rows, dtype), expected[rows].to(dtype))
        assert torch.equal(matrix.rows(torch.tensor([4, 0, 41]), torch.float32), expected[[4, 0, 41]])
        x = torch.randn(3, INPUTS)
        torch.testing.assert_close(matrix.product(x), x @ expected.t(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", ["channel", "as outputs", "turned"])
def test_fbgemm(shape: str) -> None:
    """transformers writes (E, 1, C_out) beside gate_up_proj and (E, C_out, 1) beside down_proj, turned or not."""
    codes, scale, exact = fp8_per_row(weights(EXPERTS, OUTPUTS, INPUTS))
    scale = {"channel": scale[:, None], "as outputs": scale[:, :, None], "turned": scale}[shape]
    tensors = {"": turned(codes), "_scale": scale}
    source = read_by(fbgemm.read, tensors, (EXPERTS, INPUTS, OUTPUTS), {"quant_method": "fbgemm_fp8"}, PATH)
    assert source.scheme.label == "FP8 (per channel)"
    assert expert(source, tensors, 0).is_transposed
    check(source, tensors, exact)


@pytest.mark.parametrize("shape", [(), (1,), (EXPERTS,), (EXPERTS, 1), (EXPERTS, 1, 1)])
def test_modelopt_fp8_with_a_scale_for_all_or_each(shape: tuple[int, ...]) -> None:
    weight = weights(EXPERTS, OUTPUTS, INPUTS)
    scale = torch.rand(shape) + 0.1
    codes = (weight / 4).to(torch.float8_e4m3fn)
    tensors = {"": turned(codes), "_weight_scale": scale, "_input_scale": torch.tensor(0.5)}
    source = read_by(modelopt.read, tensors, (EXPERTS, INPUTS, OUTPUTS), {"quant_method": "modelopt"}, PATH)
    assert source.scheme.label == "FP8 (per tensor)" and len(source.tensors) == 2
    check(source, tensors, codes.float() * (scale.view(-1, 1, 1) if scale.dim() else scale))


@pytest.mark.parametrize("a_scale_an_expert", [False, True])
def test_modelopt_nvfp4(a_scale_an_expert: bool) -> None:
    """Quantized along C_in and turned back: a byte's codes and the scales follow the first axis."""
    codes, scale, factor, exact = nvfp4(weights(EXPERTS, OUTPUTS, INPUTS), 16, a_scale_an_expert)
    tensors = {"": turned(codes), "_weight_scale": turned(scale), "_weight_scale_2": factor}
    source = read_by(modelopt.read, tensors, (EXPERTS, INPUTS, OUTPUTS), SETTINGS, PATH)
    assert source.scheme.label == "NVFP4 (groups of 16)"
    check(source, tensors, exact)


def test_nvfp4_of_linear_layers_in_both_dialects() -> None:
    """modelopt multiplies by its scale of scales, compressed-tensors divides by the reciprocal."""
    codes, scale, factor, exact = nvfp4(weights(OUTPUTS, INPUTS))
    mine = {".weight": codes, ".weight_scale": scale, ".weight_scale_2": factor}
    theirs = {".weight_packed": codes, ".weight_scale": scale, ".weight_global_scale": (1 / factor).reshape(1)}
    product = built(read_by(modelopt.read, mine, (OUTPUTS, INPUTS), SETTINGS), mine)
    quotient = built(read_by(compressed_tensors.read, theirs, (OUTPUTS, INPUTS), {}), theirs)
    assert torch.equal(product.expanded(), exact)
    torch.testing.assert_close(quotient.expanded(), exact, atol=0, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (OUTPUTS,), (OUTPUTS, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_of_linear_layers_with_scales_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes = (weights(OUTPUTS, INPUTS) / 4).to(torch.float8_e4m3fn)
    scale = (torch.rand(shape) + 0.1).to(dtype)
    tensors = {".weight": codes, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}
    matrix = built(read_by(compressed_tensors.read, tensors, (OUTPUTS, INPUTS), {}), tensors)
    expected = codes.float() * (scale.float().view(-1, 1) if scale.dim() else scale.float())
    assert torch.equal(matrix.expanded(), expected) and torch.equal(matrix.expanded(dtype), expected.to(dtype))
