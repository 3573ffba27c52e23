"""Fused experts (E, C_in, C_out) as modelopt and FBGEMM store them, written by their formulas.

modelopt 0.47: NVFP4QTensor.quantize, to_quantized_weight. FBGEMM: quantize_fp8_per_row, as transformers 5 calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])


def nvfp4(weight: Tensor, size: int = 16, a_scale_an_expert: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight (..., C_out, C_in) -> codes, scales, scale of scales, and what they dequantize to in float32."""
    top = weight.abs().amax((-2, -1)) if a_scale_an_expert else weight.abs().max()
    factor = top.float() / (6 * 448)
    by_matrix = factor.view(*factor.shape, 1, 1) if factor.dim() else factor
    groups = weight.float().unflatten(-1, (-1, size))
    scale = (groups.abs().amax(-1) / (6 * by_matrix)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    wide = (scale.float() * by_matrix).unsqueeze(-1)
    scaled = (groups / wide).flatten(-2)
    ordinal = torch.searchsorted(BOUNDS, scaled.abs().contiguous()).to(torch.uint8)
    codes = ((scaled < 0).to(torch.uint8) << 3) + ordinal
    packed = codes[..., 1::2] << 4 | codes[..., ::2]
    exact = (E2M1[codes.long()].unflatten(-1, (-1, size)) * wide).flatten(-2)
    return packed, scale, factor, exact


def fp8_per_row(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight (..., C_out, C_in) -> codes, scales (..., C_out), and what they dequantize to in float32."""
    scale = weight.float().abs().amax(-1).clamp(min=1e-12) / 448
    codes = (weight.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale.unsqueeze(-1)


def turned(tensor: Tensor) -> Tensor:
    """The last two dimensions swapped, in memory, too."""
    return tensor.transpose(-1, -2).contiguous()
