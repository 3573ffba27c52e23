"""PyTorch layers without random initialisation, since weights always come from a checkpoint; and RMSNorm.

Elementwise work on a CPU runs in pieces that fit into the processor's caches: PyTorch's kernels would write float32
copies of the whole input to memory, several times its size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.quantization.form import StoredMatrix, Weight
from model.simd.products import FEW_ROWS, is_readable, plain_operand, product

PIECE_ELEMENTS = 2**19
"""Input elements processed at a time."""


class Linear(nn.Linear):
    """nn.Linear without initialisation, which even on the meta device costs most of a second and 70 MB.

    Its weight may be a StoredMatrix.
    """

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x (..., C_in) and weight (C_out, C_in) -> (..., C_out).

    A few rows on a CPU go to vector code, which reads weights once at about memory bandwidth, in whichever layout they
    are. Where it is not installed, oneDNN is disabled for one row and contiguous 16-bit weights: PyTorch's native loop
    is twice as fast then.
    """
    if isinstance(weight, StoredMatrix):
        out = weight.product(x)
        return out if bias is None else out.add_(bias)
    is_one_row = x.numel() == x.shape[-1]
    is_wide = weight.dtype == torch.float32  # of these PyTorch reads one row at the speed of memory
    if x.numel() <= FEW_ROWS * x.shape[-1] and weight.device.type == "cpu" and not (is_one_row and is_wide):
        operand = plain_operand(weight)
        if operand is not None and is_readable(operand):
            out = product(operand, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], weight.shape[0])
            return out if bias is None else out.add_(bias)
    if not is_one_row or weight.device.type != "cpu" or is_wide or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    enabled = torch._C._get_mkldnn_enabled()  # the public switch emits unrelated warnings
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class Embedding(nn.Embedding):
    """nn.Embedding without initialisation. Its weight may be a StoredMatrix, of which rows are expanded."""

    def reset_parameters(self) -> None:
        pass

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids (...) -> embeddings (..., C) in this dtype, a new tensor."""
        return looked_up(ids, self.weight, dtype)


def looked_up(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows (..., C) of a matrix by index (...)."""
    if isinstance(weight, StoredMatrix):
        return weight.rows(ids, dtype)
    return F.embedding(ids, weight).to(dtype)


def set_weight(module: nn.Module, name: str, weight: Weight | nn.Module) -> None:
    """Replaces a parameter or submodule; a tensor becomes a parameter."""
    if isinstance(weight, nn.Module):
        module._parameters.pop(name, None)
        setattr(module, name, weight)
        return
    module._modules.pop(name, None)
    is_parameter = isinstance(weight, nn.Parameter)
    setattr(module, name, weight if is_parameter else nn.Parameter(weight, requires_grad=False))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with learned scale (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> the same shape and dtype, computed in float32."""
        return in_pieces(x, lambda piece, _: F.rms_norm(piece, (x.shape[-1],), self.weight, self.eps))


def in_pieces(x: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Applies `function`, which keeps shape and dtype, to x (B, T, ...) in slices along T.

    `function` gets the slice of x and the slice of token indices.
    """
    tokens = x.shape[1]
    if x.numel() <= PIECE_ELEMENTS or x.device.type != "cpu":
        return function(x, slice(0, tokens))
    out, size = torch.empty(x.shape, dtype=x.dtype), max(1, PIECE_ELEMENTS * tokens // x.numel())
    for start in range(0, tokens, size):
        here = slice(start, min(start + size, tokens))
        out[:, here] = function(x[:, here], here)
    return out
