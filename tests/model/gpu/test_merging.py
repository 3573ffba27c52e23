"""Merging partial attention by a kernel, run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from model.kernels.attend import AttentionState, merge
from support.triton import DEVICE, needs_triton

pytestmark = [needs_triton(), pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of the interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("laid_out", ["tokens first", "heads first"])
def test_as_pytorch_merges(dtype: torch.dtype, laid_out: str) -> None:
    from model.gpu.merging import merge_into

    b, h, t, d = 2, 3, 21, 40
    out, part = torch.randn(b, t, h, d, device=DEVICE), torch.randn(b, h, t, d, device=DEVICE).to(dtype)
    out = out.transpose(1, 2)
    if laid_out == "tokens first":
        part = part.transpose(1, 2).contiguous().transpose(1, 2)
    lse, part_lse = (8 * torch.randn(b, h, t, device=DEVICE) for _ in range(2))
    lse[0, 1, :4], part_lse[0, 1, 2:7] = -torch.inf, -torch.inf  # none of two keys seen, one, or both
    out[0, 1, :4], part[0, 1, 2:7] = 0, 0
    expected = merge(AttentionState(out.clone(), lse.clone()), AttentionState(part.float(), part_lse))
    here = slice(1, t)
    first = out[:, :, 0].clone(), lse[:, :, 0].clone()
    merge_into(out[:, :, here], lse[:, :, here], part[:, :, here], part_lse[:, :, here])
    assert torch.equal(out[:, :, 0], first[0]) and torch.equal(lse[:, :, 0], first[1])
    torch.testing.assert_close(out[:, :, here], expected.out[:, :, here], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[:, :, here], expected.lse[:, :, here], rtol=1e-6, atol=1e-6)
