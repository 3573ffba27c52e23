"""Matrices in a stored form as 16-bit numbers, in one launch for all experts of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from model.gpu.expand_kernel import expand_kernel
from model.gpu.forms import Form
from model.transfers import to_device

ROWS, COLUMNS = 32, 128
"""Of the part that a program expands."""


def expand(forms: Sequence[Form], rows: slice, out: Tensor) -> None:
    """Writes these rows of matrices (N, K), stored alike, to `out` (matrices, rows, K), 16-bit and contiguous.

    Each value is rounded once.
    """
    first, (count, n, k) = forms[0], out.shape
    table = to_device(torch.tensor([form.addresses for form in forms]), out.device)
    columns = min(COLUMNS, first.group & -first.group)
    is_aligned = not any(form.addresses[0] % 16 for form in forms)
    expand_kernel[(triton.cdiv(n, ROWS), triton.cdiv(k, columns), count)](
        table, first.codes, first.scale, out, rows.start, n, k, *first.strides, *first.scale_strides, first.kind,
        first.group, ROWS, columns, is_aligned,
    )  # fmt: skip
