"""Products of a few rows with stored codes, run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from model.gpu.layer_forms import form_of
from model.quantization.choice import Quantization
from model.quantization.form import StoredMatrix
from model.weights.quantizing import QuantizingScheme
from support.triton import DEVICE, needs_triton

pytestmark = needs_triton()

HALVES = (torch.float16, torch.bfloat16)[: 2 if DEVICE == "cuda" else 1]  # the interpreter knows no bfloat16


@pytest.mark.parametrize(("kind", "k"), [("int4", 256), ("int4-g32", 96), ("int8", 160), ("fp8", 160)])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_with_codes_are_exact_but_for_their_sums(kind: str, k: int, dtype: torch.dtype) -> None:
    """Against float64; a row is not changed by those beside it."""
    from model.gpu.layers import _linear

    n, t = 70, 5
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE)
    matrix = QuantizingScheme(Quantization.parse(kind), False, k).build({"weight": weight}, (n, k))
    assert isinstance(matrix, StoredMatrix)
    form = form_of(matrix)
    assert form is not None
    x, out = torch.randn(t, k, dtype=dtype, device=DEVICE), torch.empty(t, n, device=DEVICE)
    _linear(x, [form], out, t)
    expanded = torch.empty(n, k, device=DEVICE)
    matrix.expand(slice(0, n), expanded)
    expected = x.double() @ expanded.double().t()
    assert (out - expected).norm() < 1e-6 * expected.norm()
    one = torch.empty(1, n, device=DEVICE)
    _linear(x[2:3], [form], one, 1)
    assert torch.equal(one[0], out[2])
