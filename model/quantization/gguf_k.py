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

from model.quantization.gguf_simple import IQ4_VALUES, halves, looked_up


def expand_q2_k(blocks: Tensor, out: Tensor) -> None:
    scale, minimum = halves(blocks[:, 80:84]).split(1, 1)
    codes = torch.stack([(blocks[:, 16:80].unflatten(1, (2, 32)) >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    groups = out.view(-1, 16, 16).copy_(codes.view(-1, 16, 16))
    groups.mul_((scale * (blocks[:, :16] & 15))[..., None])
    groups.sub_((minimum * (blocks[:, :16] >> 4))[..., None])


def expand_q3_k(blocks: Tensor, out: Tensor) -> None:
    low = torch.stack([(blocks[:, 32:96].unflatten(1, (2, 32)) >> shift) & 3 for shift in (0, 2, 4, 6)], 2).flatten(
        1, 2
    )
    high = torch.stack([(blocks[:, :32] >> shift) & 1 for shift in range(8)], 1)
    stored = blocks[:, 96:108]
    scales = torch.cat([stored[:, :8] & 15, stored[:, :8] >> 4], 1)
    scales |= torch.cat([((stored[:, 8:] >> shift) & 3) << 4 for shift in (0, 2, 4, 6)], 1)
    groups = out.view(-1, 16, 16).copy_((low | (high << 2)).sub_(4).view(torch.int8).view(-1, 16, 16))
    groups.mul_((halves(blocks[:, 108:110]) * scales.sub_(32).view(torch.int8))[..., None])


def expand_q4_k(blocks: Tensor, out: Tensor) -> None:
    codes = blocks[:, 16:144].unflatten(1, (4, 32))
    groups = out.view(-1, 8, 32)
    groups[:, ::2], groups[:, 1::2] = codes & 15, codes >> 4
    scales, minimums = group_scales(blocks)
    groups.mul_(scales).sub_(minimums)


def expand_q5_k(blocks: Tensor, out: Tensor) -> None:
    low = blocks[:, 48:176].unflatten(1, (4, 32))
    high = torch.stack([((blocks[:, 16:48] >> shift) & 1) << 4 for shift in range(8)], 1)
    groups = out.view(-1, 8, 32)
    groups[:, ::2], groups[:, 1::2] = (low & 15) | high[:, ::2], (low >> 4) | high[:, 1::2]
    scales, minimums = group_scales(blocks)
    groups.mul_(scales).sub_(minimums)


def expand_q6_k(blocks: Tensor, out: Tensor) -> None:
    low, high = blocks[:, :128].unflatten(1, (2, 64)), blocks[:, 128:192].unflatten(1, (2, 32))
    codes = torch.cat([low & 15, low >> 4], 2)
    codes |= torch.cat([((high >> shift) & 3) << 4 for shift in (0, 2, 4, 6)], 2)
    groups = out.view(-1, 16, 16).copy_(codes.sub_(32).view(torch.int8).view(-1, 16, 16))
    groups.mul_((halves(blocks[:, 208:210]) * blocks[:, 192:208].view(torch.int8))[..., None])


def expand_iq4_xs(blocks: Tensor, out: Tensor) -> None:
    codes = blocks[:, 8:136].unflatten(1, (8, 16))
    groups = out.view(-1, 8, 32)
    groups[..., :16], groups[..., 16:] = looked_up(codes & 15, IQ4_VALUES), looked_up(codes >> 4, IQ4_VALUES)
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], 2).flatten(1)
    scales = (low | (high << 4)).sub_(32).view(torch.int8)
    groups.mul_((halves(blocks[:, :2]) * scales)[..., None])


def group_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's scales and minimums of groups, float32 (n, 8, 1) each.

    Of the 12 bytes, the first four hold the scales of groups 0 to 3 and the next four their minimums, in the low 6
    bits. The last four hold the low 4 bits of groups 4 to 7, scales in the low halves; their top 2 bits are those that
    the first eight bytes have left.
    """
    first, second, third = blocks[:, 4:16].split(4, 1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], 1)
    minimums = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], 1)
    scale, minimum = halves(blocks[:, :4]).split(1, 1)
    return (scale * scales)[..., None], (minimum * minimums)[..., None]
