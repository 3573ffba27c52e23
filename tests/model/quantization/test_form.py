"""Products with matrices that are expanded tile by tile, for few rows and for many."""

from __future__ import annotations

import copy

import pytest
import torch

from model.quantization import form
from model.quantization.plain import PlainMatrix

COLUMNS, OUT = 10, 107  # tiles of 32 or 64 rows, and a rest


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_by_tiles(rows: int, is_transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a tile, which follows from the number of rows, it is the same product."""
    monkeypatch.setattr(form, "TILE_ELEMENTS", 32 * COLUMNS)
    monkeypatch.setattr(form, "MANY_ROWS", 5)
    monkeypatch.setattr(form, "LARGE_TILE_ELEMENTS", 64 * COLUMNS)
    generator = torch.Generator().manual_seed(rows)
    shape = (COLUMNS, OUT) if is_transposed else (OUT, COLUMNS)
    weight = torch.randn(shape, generator=generator).bfloat16()
    weight = weight.t() if is_transposed else weight
    x = torch.randn(rows, COLUMNS, generator=generator)
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(PlainMatrix(weight).product(x), expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_part_of_the_rows(is_transposed: bool) -> None:
    """As speed is measured: a copy with fewer rows, of a matrix that vector code reads where it is installed."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(512, 640, generator=generator).bfloat16()
    weight = weight.t() if is_transposed else weight
    whole, x = PlainMatrix(weight), torch.randn(1, weight.shape[1], generator=generator)
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(whole.product(x), expected, rtol=0, atol=1e-3)
    part = copy.copy(whole)
    part.out_features = 100
    torch.testing.assert_close(part.product(x), expected[:, :100], rtol=0, atol=1e-3)
