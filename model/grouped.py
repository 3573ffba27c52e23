"""Products of rows that are sorted by group with a matrix for each group, whose row counts only the device knows.

To read the counts, the host would have to wait until the device has computed them, in every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpu.available import has_triton
from model.gpu.forms import Form, are_alike
from model.quantization.form import StoredMatrix, Weight

TILE_ELEMENTS = 2**27
"""Elements of all groups' matrices that are expanded at a time: 256 MiB in 16 bits."""

ALIGNMENT = 8
"""The kernel wants widths of a multiple of 16 bytes."""


def group_ends(sorted_groups: Tensor, groups: int) -> Tensor:
    """Group numbers (N,) in ascending order -> where each group's rows end, (groups,) int32, on the same device.

    `bincount` makes the host wait on a GPU.
    """
    numbers = torch.arange(groups, dtype=sorted_groups.dtype, device=sorted_groups.device)
    return torch.searchsorted(sorted_groups, numbers, right=True, out_int32=True)


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x (N, C_in) sorted by group, weights (groups, C_in, C_out) and `ends` as `group_ends` has them -> (N, C_out)."""
    public: Any = getattr(F, "grouped_mm", None)  # from torch 2.10 on
    return torch._grouped_mm(x, weights, offs=ends) if public is None else public(x, weights, offs=ends)


def stored_product(x: Tensor, weights: Sequence[Weight], ends: Tensor) -> Tensor:
    """The same with matrices (C_out, C_in) in any form, of which parts are expanded, the same rows of all of them."""
    features, inner = weights[0].shape
    step = max(32, TILE_ELEMENTS // (len(weights) * inner) // 32 * 32)
    out, forms = x.new_empty(len(x), features), _forms(weights, x.device)
    for start in range(0, features, step):
        here = slice(start, min(start + step, features))
        tile = x.new_empty(len(weights), here.stop - here.start, inner)
        if forms is not None:
            from model.gpu.expanding import expand  # here: Triton comes with builds of torch for GPUs only

            expand(forms, here, tile)
            out[:, here] = grouped_product(x, tile.transpose(1, 2), ends)
            continue
        for rows, weight in zip(tile, weights, strict=True):
            if isinstance(weight, StoredMatrix):
                weight.write(here, rows)
            else:
                rows.copy_(weight[here])
        out[:, here] = grouped_product(x, tile.transpose(1, 2), ends)
    return out


def _forms(weights: Sequence[Weight], device: torch.device) -> list[Form] | None:
    """How one kernel reads all the matrices; None if there is none for them."""
    if not has_triton(device):
        return None
    forms = [form for weight in weights if isinstance(weight, StoredMatrix) and (form := weight.form()) is not None]
    return forms if len(forms) == len(weights) and are_alike(forms) else None


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether bfloat16 rows are multiplied without the host. On older GPUs torch loops over the groups, and waits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
