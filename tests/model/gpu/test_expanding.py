"""Stored matrices as 16-bit numbers by a kernel, run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from model.gpu.layer_forms import form_of
from model.quantization.choice import Quantization
from model.quantization.form import StoredMatrix
from model.weights.quantizing import QuantizingScheme
from support.triton import DEVICE, needs_triton

pytestmark = needs_triton()


@pytest.mark.parametrize("kind", ["int4", "int4-g32", "int8", "fp8"])
def test_rows_are_those_that_pytorch_expands(kind: str) -> None:
    from model.gpu.expanding import expand

    n, k, here = 70, 256, slice(3, 67)
    matrices = []
    for _ in range(2):
        weight = torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE)
        made = QuantizingScheme(Quantization.parse(kind), False, k).build({"weight": weight}, (n, k))
        assert isinstance(made, StoredMatrix)
        matrices.append(made)
    forms = [form for matrix in matrices if (form := form_of(matrix)) is not None]
    assert len(forms) == 2
    for dtype in (torch.float16, torch.bfloat16)[: 2 if DEVICE == "cuda" else 1]:  # the interpreter cuts bfloat16
        out = torch.full((2, 64, k), torch.nan, dtype=dtype, device=DEVICE)
        expand(forms, here, out)
        for got, matrix in zip(out, matrices, strict=True):
            expected = torch.empty(64, k, dtype=dtype, device=DEVICE)
            matrix.expand(here, expected)
            assert torch.equal(got, expected)
