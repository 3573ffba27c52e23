"""GGUF's blocks of 256 weights in groups of 16 or 32: a scale for the block, and one of few bits for each group.

In all of them products of the scales and a code are exact in float32, so each weight is rounded at most once, in the
final difference. Bits of the same position in a run of bytes belong to consecutive weights.

    type           bytes of a block, in order                              weight
    Q2_K           scales and minimums 16, codes 64, scale 2, minimum 2    scale s code - minimum m, groups of 16
    Q3_K           high bits 32, codes 64, scales 12, scale 2              scale (s - 32) (code - 4), groups of 16
    Q4_K           scale 2, minimum 2, scales and minimums 12, codes 128   scale s code - minimum m, groups of 32
    Q5_K           as Q4_K, with high bits 32 before the codes             the same
    Q6_K           low bits 128, high bits 64, scales 16, scale 2          scale s (code - 32), groups of 16
    IQ4_XS         scale 2, scales' high bits 2, low bits 4, codes 128     scale (s - 32) IQ4_VALUES[code], of 32

Functions write the weights of blocks (n, bytes), uint8, to float32 `out` (n, 256).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.quantization.gguf_simple import IQ4_VALUES, halves, look_up, nibbles, planes


def expand_q2_k(blocks: Tensor, out: Tensor) -> None:
    codes = planes(runs_of_32(blocks[:, 16:80]), (0, -2, -4, -6), mask=3)
    write_groups(codes, (0, 4, 1, 5, 2, 6, 3, 7), out)
    scales, minimums = nibbles(blocks[:, :16])
    scale, minimum = halves(blocks[:, 80:84]).split(1, 1)
    groups = out.view(-1, 16, 16)
    groups.mul_(scales.float().mul_(scale)[..., None])
    groups.sub_(minimums.float().mul_(minimum)[..., None])


def expand_q3_k(blocks: Tensor, out: Tensor) -> None:
    codes = planes(runs_of_32(blocks[:, 32:96]), (0, -2, -4, -6), mask=3).flatten(0, 1)
    codes |= planes(blocks[:, :32], (2, -2, 1, -3, 0, -4, -1, -5), mask=4)
    write_groups(codes.sub_(4).view(torch.int8), (0, 4, 1, 5, 2, 6, 3, 7), out)
    stored = bytes_first(blocks[:, 96:108])  # low bits 8, the high ones' halves in turn; high bits 4
    scales = nibbles(stored[:8]).view(4, 4, -1)
    scales |= planes(stored[8:], (4, 2, 0, -2), mask=48)
    scales = bytes_first(scales.view(16, -1)).sub_(32).view(torch.int8)
    out.view(-1, 16, 16).mul_(scales.float().mul_(halves(blocks[:, 108:110]))[..., None])


def expand_q4_k(blocks: Tensor, out: Tensor) -> None:
    codes = blocks[:, 16:144].unflatten(1, (4, 32))
    groups = out.view(-1, 8, 32)
    groups[:, ::2] = codes & 15
    groups[:, 1::2] = codes >> 4
    scales, minimums = group_scales(blocks)
    groups.mul_(scales).sub_(minimums)


def expand_q5_k(blocks: Tensor, out: Tensor) -> None:
    codes = nibbles(runs_of_32(blocks[:, 48:176])).flatten(0, 1)
    codes |= planes(blocks[:, 16:48], (4, 2, 0, -2, 3, 1, -1, -3), mask=16)
    write_groups(codes, (0, 2, 4, 6, 1, 3, 5, 7), out)
    scales, minimums = group_scales(blocks)
    out.view(-1, 8, 32).mul_(scales).sub_(minimums)


def expand_q6_k(blocks: Tensor, out: Tensor) -> None:
    codes = nibbles(runs_of_32(blocks[:, :128]))  # (low or high half, 4, n, 32)
    high = planes(runs_of_32(blocks[:, 128:192]), (4, 2, 0, -2), mask=48)  # (4, 2, n, 32)
    codes.unflatten(1, (2, 2)).bitwise_or_(high.unflatten(0, (2, 2)).transpose(1, 2))
    write_groups(codes.sub_(32).view(torch.int8).flatten(0, 1), (0, 1, 4, 5, 2, 3, 6, 7), out)
    scales = blocks[:, 192:208].view(torch.int8)
    out.view(-1, 16, 16).mul_(scales.float().mul_(halves(blocks[:, 208:210]))[..., None])


def expand_iq4_xs(blocks: Tensor, out: Tensor) -> None:
    look_up(nibbles(blocks[:, 8:136]).view(2, -1, 16), IQ4_VALUES, out.view(-1, 32))
    stored = bytes_first(blocks[:, 2:8])  # high bits 2, low bits 4, each with the first group's lowest
    scales = nibbles(stored[2:]).transpose(0, 1).contiguous().view(2, 4, -1)
    scales |= planes(stored[:2], (4, 2, 0, -2), mask=48).transpose(0, 1)
    scales = bytes_first(scales.view(8, -1)).sub_(32).view(torch.int8)
    out.view(-1, 8, 32).mul_(scales.float().mul_(halves(blocks[:, :2]))[..., None])


def runs_of_32(stored: Tensor) -> Tensor:
    """Bytes (n, 32 k) -> (k, n, 32), contiguous."""
    return stored.unflatten(1, (-1, 32)).transpose(0, 1).contiguous()


def bytes_first(stored: Tensor) -> Tensor:
    """Bytes (n, k) -> (k, n), contiguous, or back: few bytes of many blocks are quicker to work on this way."""
    return stored.t().contiguous()


def write_groups(codes: Tensor, order: tuple[int, ...], out: Tensor) -> None:
    """Codes of 8 groups of 32 weights (8, n, 32), or so once flattened, in this order -> float32 `out` (n, 256)."""
    groups = out.view(-1, 8, 32)
    for group, plane in zip(order, codes.view(8, -1, 32), strict=True):
        groups[:, group] = plane


def group_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's scales and minimums of groups, float32 (n, 8, 1) each.

    Of the 12 bytes, the first four hold the scales of groups 0 to 3 and the next four their minimums, in the low 6
    bits. The last four hold the low 4 bits of groups 4 to 7, scales in the low halves; their top 2 bits are those that
    the first eight bytes have left.
    """
    stored = bytes_first(blocks[:, 4:16]).view(3, 4, -1)
    codes = stored.new_empty(2, 2, 4, len(blocks))  # (scales or minimums, half of the groups, 4, n)
    torch.bitwise_and(stored[:2], 63, out=codes[:, 0])
    torch.bitwise_right_shift(stored[:2], 2, out=codes[:, 1])
    codes[:, 1].bitwise_and_(48).bitwise_or_(nibbles(stored[2]))
    values = bytes_first(codes.view(16, -1)).float().view(-1, 2, 8)
    values.mul_(halves(blocks[:, :4])[..., None])
    return values[:, 0, :, None], values[:, 1, :, None]
