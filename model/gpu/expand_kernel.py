"""The Triton kernel of model.gpu.expanding."""

from __future__ import annotations

import triton
import triton.language as tl

from model.gpu.kernels import INT4_WORDS, address


@triton.jit
def expand_kernel(
    table, codes_like, scale_like, out, first, n, k, w_n, w_k, scale_n, scale_k,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + n - 1 of matrices whose addresses are in table (matrices, 2) -> out (matrices, n, K)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start, matrix = tl.program_id(1) * COLUMNS, tl.program_id(2)
    column = start + tl.arange(0, COLUMNS)
    codes = address(table + 2 * matrix, codes_like, ALIGNED)
    scale = address(table + 2 * matrix + 1, scale_like, False)
    here = (first + row).to(tl.int64)
    inside = row < n
    if KIND == INT4_WORDS:
        pair = start // 2 + tl.arange(0, COLUMNS // 2)
        there = inside[:, None] & (pair < tl.multiple_of(k // 2, 16))[None, :]
        both = tl.load(codes + here[:, None] * w_n + pair[None, :] * w_k, there, other=0)
        low, high = (both & 15).to(tl.int8) - 8, (both >> 4).to(tl.int8) - 8
        numbers = tl.reshape(tl.join(low, high), (ROWS, COLUMNS)).to(tl.float32)
    else:
        there = inside[:, None] & (column < k)[None, :]
        numbers = tl.load(codes + here[:, None] * w_n + column[None, :] * w_k, there, other=0.0).to(tl.float32)
    factor = tl.load(scale + here * scale_n + start // GROUP * scale_k, inside, other=0.0).to(tl.float32)
    at = out + (matrix.to(tl.int64) * n + row)[:, None] * k + column[None, :]
    there = inside[:, None] & (column < k)[None, :]
    tl.store(at, (numbers * factor[:, None]).to(out.dtype.element_ty), there)
