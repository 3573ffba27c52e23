"""Quantizes a matrix to forms that are read here: int8 and FP8 with a scale a row, int4 with a scale a group.

Scales are bfloat16, as published files have them, and codes are chosen for the rounded scales. No calibration data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ELEMENTS = 2**18
"""Elements that are quantized at a time: in float32 a few copies of them fit into the processor's caches."""

LARGEST_INT8, LARGEST_INT4, LARGEST_FLOAT8 = 127, 7, 448
SMALLEST_SCALE = 2.0**-100
"""Of rows and groups of zeros, whose codes are 0 with any scale."""

FLOAT8_SHARES = tuple(2 ** (number / 8) for number in range(8))
"""Scales that are tried for a row of e4m3 codes: shares of the one at which its largest magnitude is just code 448.

Twice a scale gives the same mantissas again. What differs is where a row's magnitudes lie between powers of two: e4m3
is up to twice as fine, in proportion, just below one as just above.
"""

CLIPPING = (8 / 7, 1.0, 0.9, 0.8)
"""Scales that are tried for a group of int4 codes: shares of the one at which its largest magnitude is just code -8."""


def to_int8(weight: Tensor) -> dict[str, Tensor]:
    """(C_out, C_in) of any floating-point dtype -> "codes" int8, and "scale" bfloat16 (C_out, 1)."""
    return _by_row(weight, torch.int8, LARGEST_INT8)


def to_int4(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """(C_out, C_in) -> "codes" int32 (C_out, C_in / 8), and "scale" bfloat16 (C_out, C_in / group_size).

    A word has eight codes, the first in its low bits, to which 8 is added. C_in is a multiple of the group size, and
    that of 8. A scale is negative where a group's largest magnitude is positive, as codes reach -8, but only 7.
    """
    rows_in_all, columns = weight.shape
    packed = torch.empty(rows_in_all, columns // 2, dtype=torch.uint8, device=weight.device)
    scale = _empty_scale(weight, columns // group_size)
    for rows in _tiles(weight):
        groups = _numbers(weight, rows).unflatten(1, (-1, group_size))
        best = _int4_scale(groups)
        scale[rows] = best[..., 0]
        codes = _int4_codes(groups, best).flatten(1).add_(8).to(torch.uint8)
        packed[rows] = codes[:, ::2] | codes[:, 1::2] << 4
    return {"codes": packed.view(torch.int32), "scale": scale}


def to_float8(weight: Tensor) -> dict[str, Tensor]:
    """(C_out, C_in) -> "codes" float8_e4m3fn, and "scale" bfloat16 (C_out, 1)."""
    return _by_row(weight, torch.float8_e4m3fn, LARGEST_FLOAT8)


def _by_row(weight: Tensor, dtype: torch.dtype, largest: int) -> dict[str, Tensor]:
    """Codes of this dtype, up to `largest`, with a scale a row."""
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = _empty_scale(weight, 1)
    for rows in _tiles(weight):
        numbers = _numbers(weight, rows)
        smallest = numbers.abs().amax(1, keepdim=True) / largest
        scale[rows] = _float8_scale(numbers, smallest) if dtype.is_floating_point else _rounded(smallest)
        shares = numbers / scale[rows].float()
        if not dtype.is_floating_point:
            shares.round_()
        codes[rows] = shares.clamp_(-largest, largest).to(dtype)
    return {"codes": codes, "scale": scale}


def _float8_scale(numbers: Tensor, smallest: Tensor) -> Tensor:
    """The scales (N, 1) in float32 at which rows (N, C_in) lose least, by the sum of squares."""
    best = _rounded(smallest).float()
    least = _float8_error(numbers, best)
    for share in FLOAT8_SHARES[1:]:
        scale = _rounded(smallest * share).float()
        best, least = _better(scale, _float8_error(numbers, scale), best, least)
    return best


def _float8_error(numbers: Tensor, scale: Tensor) -> Tensor:
    """The root of the sum of squares (N, 1) of what is lost.

    Adds half a step to the magnitude's bits and keeps three of the mantissa: quicker than to convert and back. It takes
    codes below 2^-6, which hardly matter, for finer than they are.
    """
    exact = numbers / scale
    coded = exact.view(torch.int32).add(2**19).bitwise_and_(-(2**20)).view(torch.float32)
    return torch.linalg.vector_norm(coded.sub_(exact), dim=1, keepdim=True) * scale


def _int4_scale(groups: Tensor) -> Tensor:
    """The scales (..., 1) in float32 at which groups (..., N) lose least, by the sum of squares.

    The best of a few, and then the one that fits its codes best, by least squares.
    """
    high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    peak = torch.where(high >= -low, high, low)
    best = _rounded(peak * (CLIPPING[0] / -8)).float()
    least = _int4_error(groups, best)
    for share in CLIPPING[1:]:
        scale = _rounded(peak * (share / -8)).float()
        best, least = _better(scale, _int4_error(groups, scale), best, least)
    codes = _int4_codes(groups, best)
    fitting = (codes * groups).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp_(min=1)
    scale = _rounded(fitting).float()
    return _better(scale, _int4_error(groups, scale), best, least)[0]


def _better(scale: Tensor, error: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row or group the better of two scales, and its error."""
    is_better = error < least
    return torch.where(is_better, scale, best), torch.where(is_better, error, least)


def _int4_codes(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale).round_().clamp_(-LARGEST_INT4 - 1, LARGEST_INT4)


def _int4_error(groups: Tensor, scale: Tensor) -> Tensor:
    """The sum of squares (..., 1) of what is lost."""
    return _int4_codes(groups, scale).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)


def _rounded(scale: Tensor) -> Tensor:
    """As bfloat16, and not so small that dividing by it overflows."""
    return torch.where(scale.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scale).to(torch.bfloat16)


def _empty_scale(weight: Tensor, columns: int) -> Tensor:
    return torch.empty(len(weight), columns, dtype=torch.bfloat16, device=weight.device)


def _numbers(weight: Tensor, rows: slice) -> Tensor:
    """The rows in float32, contiguous: sums do not depend on strides, and in published experts, which are transposed,
    every step would stride over memory."""
    return weight[rows].float().contiguous()  # two steps take half the time of one that does both


def _tiles(weight: Tensor) -> Iterator[slice]:
    step = max(1, TILE_ELEMENTS // max(1, weight.shape[1]))
    return (slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step))
