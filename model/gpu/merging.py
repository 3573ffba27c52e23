"""Merging partial attention in one pass over memory: PyTorch's operations take five times as long."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16
"""Tokens of one head that a program merges."""


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds attention over further keys: out (B, H, T, D) float32 and lse (B, H, T) float32 are changed in place.

    `part` has any float dtype. The arithmetic is that of `model.kernels.attend.merge`.
    """
    b, h, t, d = out.shape
    assert out.stride(3) == 1 and part.stride(3) == 1, (out.stride(), part.stride())
    strides = (*out.stride()[:3], *lse.stride(), *part.stride()[:3], *part_lse.stride())
    width = triton.next_power_of_2(d)
    _merge[(triton.cdiv(t, TOKENS), h, b)](out, lse, part, part_lse, t, d, *strides, TOKENS, width)


@triton.jit
def _merge(
    out, lse, part, part_lse, t, d,
    out_b, out_h, out_t, lse_b, lse_h, lse_t, part_b, part_h, part_t, part_lse_b, part_lse_h, part_lse_t,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, WIDTH)
    known = tokens < t
    there = known[:, None] & (column < d)[None, :]
    tokens = tokens.to(tl.int64)
    at_lse = lse + row * lse_b + head * lse_h + tokens * lse_t
    a = tl.load(at_lse, known, other=0.0)
    b = tl.load(part_lse + row * part_lse_b + head * part_lse_h + tokens * part_lse_t, known, other=0.0)
    largest = tl.maximum(tl.maximum(a, b), -3.4028234663852886e38)  # no NaN where no key is seen
    weight_a, weight_b = tl.exp(a - largest), tl.exp(b - largest)
    total = weight_a + weight_b
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    at_out = out + row * out_b + head * out_h + tokens[:, None] * out_t + column[None, :]
    x = tl.load(at_out, there, other=0.0)
    y = tl.load(part + row * part_b + head * part_h + tokens[:, None] * part_t + column[None, :], there, other=0.0)
    merged = x * (weight_a * inverse)[:, None] + y.to(tl.float32) * (weight_b * inverse)[:, None]
    tl.store(at_out, merged, there)
    tl.store(at_lse, largest + tl.log(total), known)
