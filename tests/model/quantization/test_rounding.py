"""Quantizing a matrix: for the scales chosen here, the codes are those that compressed-tensors chooses and packs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from model.quantization import rounding
from model.quantization.affine import AffineScheme
from model.quantization.float8 import Float8Scheme
from model.quantization.form import StoredMatrix, Weight
from model.quantization.rounding import to_float8, to_int4, to_int8
from model.quantization.scaled import PER_CHANNEL, Grain

ROWS, COLUMNS, GROUP = 37, 192, 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    """With outliers, a row of zeros and a group of zeros."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    weight[4, 7], weight[5, 100], weight[6], weight[7, 32:64] = 3.0, -2.5, 0.0, 0.0
    return weight.to(dtype)


def expanded(weight: Weight) -> Tensor:
    assert isinstance(weight, StoredMatrix)
    return weight.expanded(torch.float32)


def as_int8(made: Mapping[str, Tensor]) -> Tensor:
    return expanded(AffineScheme(8, PER_CHANNEL, is_packed=False).build(made, (ROWS, COLUMNS)))


def as_int4(made: Mapping[str, Tensor]) -> Tensor:
    return expanded(AffineScheme(4, Grain(1, GROUP)).build(made, (ROWS, COLUMNS)))


def as_float8(made: Mapping[str, Tensor]) -> Tensor:
    return expanded(Float8Scheme(PER_CHANNEL).build(made, tuple(made["codes"].shape)))


def int4(weight: Tensor) -> dict[str, Tensor]:
    return to_int4(weight, GROUP)


FORMS = [(to_int8, as_int8, 1e-4), (int4, as_int4, 1e-2), (to_float8, as_float8, 1e-3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quantize", "read", "largest_error"), FORMS)
def test_little_is_lost(
    quantize: Callable[[Tensor], dict[str, Tensor]],
    read: Callable[[Mapping[str, Tensor]], Tensor],
    largest_error: float,
    dtype: torch.dtype,
) -> None:
    weight = matrix(dtype)
    before = weight.clone()
    made = quantize(weight)
    assert torch.equal(weight, before) and all(tensor.is_contiguous() for tensor in made.values())
    lost = read(made) - weight.float()
    errors = lost.square().sum(1) / weight.float().square().sum(1).clamp(min=1e-30)
    assert errors.median() < largest_error and not lost[6].any() and not lost[7, 32:64].any()


@pytest.mark.parametrize(("quantize", "read"), [form[:2] for form in FORMS])
def test_tiles_and_strides_change_nothing(
    quantize: Callable[[Tensor], dict[str, Tensor]],
    read: Callable[[Mapping[str, Tensor]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = quantize(matrix())
    monkeypatch.setattr(rounding, "TILE_ELEMENTS", 5 * COLUMNS + 1)
    turned = matrix().t().contiguous().t()  # as a fused expert
    for made in (quantize(matrix()), quantize(turned)):
        assert all(torch.equal(made[role].view(torch.uint8), expected[role].view(torch.uint8)) for role in expected)


def test_int4_codes_are_the_nearest_ones_as_compressed_tensors_packs_them() -> None:
    weight, made = matrix(torch.bfloat16), int4(matrix(torch.bfloat16))
    groups = weight.double().unflatten(1, (-1, GROUP))
    codes = (groups / made["scale"].double()[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
    assert torch.equal(pack_to_int32(codes, 4), made["codes"])


def test_int4_scales_are_better_than_those_of_the_largest_magnitude() -> None:
    weight = matrix()
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7.5  # what tools without calibration take
    plain = ((groups / scale.clamp(min=1e-30)).round().clamp(-8, 7) * scale - groups).square().sum()
    assert (as_int4(int4(weight)) - weight).square().sum() < 0.75 * plain


def test_float8_codes_are_the_nearest_ones() -> None:
    weight = matrix(torch.bfloat16)
    made = to_float8(weight)
    codes = (weight.float() / made["scale"].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), made["codes"].view(torch.uint8))


def test_float8_scales_are_the_best_of_those_tried() -> None:
    """By what is really lost, apart from codes below the smallest power of two."""
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(5))
    smallest = weight.abs().amax(1, keepdim=True) / 448
    lost = []
    for share in rounding.FLOAT8_SHARES:
        scale = (smallest * share).bfloat16().float()
        lost.append(((weight / scale).to(torch.float8_e4m3fn).float() * scale - weight).square().sum(1))
    found = (as_float8(to_float8(weight)) - weight).square().sum(1)
    torch.testing.assert_close(found, torch.stack(lost).amin(0), atol=0, rtol=1e-3)
    assert found.sum() < 0.92 * lost[0].sum()  # than what tools without a search take


def test_the_largest_magnitude_of_a_group_may_have_either_sign() -> None:
    weight = torch.zeros(2, GROUP)
    weight[0, :3], weight[1, :3] = torch.tensor([8.0, -1.0, 4.0]), torch.tensor([-8.0, 1.0, -4.0])
    made = int4(weight)
    assert made["scale"].flatten().tolist() == [-1.0, 1.0]
    found = expanded(AffineScheme(4, Grain(1, GROUP)).build(made, (2, GROUP)))
    assert torch.equal(found, weight)


def test_extreme_magnitudes_stay_finite() -> None:
    for size in (1e-38, 1e30):
        for quantize, read, _ in FORMS:
            found = read(quantize(matrix() * size))
            assert found.isfinite().all()
