"""PyTorch layers without random initialisation, since weights always come from a checkpoint; and RMSNorm.

Elementwise work on a CPU runs in pieces that fit into the processor's caches: PyTorch's kernels would write float32
copies of the whole input to memory, several times its size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECE_ELEMENTS = 2**19
"""Input elements processed at a time."""


class Linear(nn.Linear):
    """nn.Linear without initialisation, which even on the meta device costs most of a second and 70 MB."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C_in) and weight (C_out, C_in) -> (..., C_out).

    For one row on a CPU and contiguous 16-bit weights, oneDNN is disabled: PyTorch's native loop runs at about memory
    bandwidth, and oneDNN, which PyTorch prefers, at half of that.
    """
    is_one_row = x.numel() == x.shape[-1]
    if not is_one_row or weight.device.type != "cpu" or weight.dtype == torch.float32 or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    enabled = torch._C._get_mkldnn_enabled()  # the public switch emits unrelated warnings
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


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
