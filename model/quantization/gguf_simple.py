"""GGUF's blocks of 32 weights: one scale each, and 4, 5 or 8 bits a weight.

Scales are float16 and precede the codes. With 4 bits, the low halves of 16 bytes are weights 0 to 15, the high halves
16 to 31; a fifth bit of each weight is in 4 bytes before them, little-endian. Products of a scale and a code are exact
in float32, so each weight is rounded at most once, in the final sum.

    type           bytes of a block                       weight
    Q4_0           scale 2, codes 16                      scale (code - 8)
    Q4_1           scale 2, minimum 2, codes 16           scale code + minimum
    Q5_0           scale 2, high bits 4, codes 16         scale (code - 16)
    Q5_1           scale 2, minimum 2, high 4, codes 16   scale code + minimum
    Q8_0           scale 2, codes 32 (signed)             scale code
    IQ4_NL         scale 2, codes 16                      scale IQ4_VALUES[code]
    MXFP4          exponent 1, codes 16                   2^(exponent - 127) E2M1 value

Functions write the weights of blocks (n, bytes), uint8, to float32 `out` (n, 32).
"""

from __future__ import annotations

import torch
from torch import Tensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the E2M1 values


def expand_q4_0(blocks: Tensor, out: Tensor) -> None:
    low, high = nibbles(blocks[:, 2:18])
    out[:, :16] = low.sub_(8).view(torch.int8)
    out[:, 16:] = high.sub_(8).view(torch.int8)
    out.mul_(halves(blocks[:, :2]))


def expand_q4_1(blocks: Tensor, out: Tensor) -> None:
    out[:, :16], out[:, 16:] = nibbles(blocks[:, 4:20])
    out.mul_(halves(blocks[:, :2])).add_(halves(blocks[:, 2:4]))


def expand_q5_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(five_bits(blocks[:, 2:6], blocks[:, 6:22]).sub_(16).view(torch.int8))
    out.mul_(halves(blocks[:, :2]))


def expand_q5_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(five_bits(blocks[:, 4:8], blocks[:, 8:24]))
    out.mul_(halves(blocks[:, :2])).add_(halves(blocks[:, 2:4]))


def expand_q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:34].view(torch.int8))
    out.mul_(halves(blocks[:, :2]))


def expand_iq4_nl(blocks: Tensor, out: Tensor) -> None:
    out[:, :16], out[:, 16:] = (looked_up(codes, IQ4_VALUES) for codes in nibbles(blocks[:, 2:18]))
    out.mul_(halves(blocks[:, :2]))


def expand_mxfp4(blocks: Tensor, out: Tensor) -> None:
    out[:, :16], out[:, 16:] = (looked_up(codes, MXFP4_VALUES) for codes in nibbles(blocks[:, 1:17]))
    exponents = blocks[:, :1].int()  # of half the scale, as the values are doubled
    bits = torch.where(exponents < 2, (1 << 21) << exponents.clamp(max=1), (exponents - 1) << 23)
    out.mul_(bits.view(torch.float32))


def halves(stored: Tensor) -> Tensor:
    """float16 numbers in bytes (n, 2 k) -> float32 (n, k)."""
    return stored.view(torch.float16).float()


def nibbles(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high halves of bytes."""
    return stored & 15, stored >> 4


def looked_up(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    """The values of codes, which may have any shape."""
    table = torch.tensor(values, dtype=torch.int8, device=codes.device)
    return table[codes.int()]


def five_bits(high: Tensor, low: Tensor) -> Tensor:
    """Codes (n, 32), uint8, from their fifth bits in 4 bytes and the others in 16."""
    bits = high[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=high.device)  # (n, 4, 8)
    return torch.cat(nibbles(low), 1) | ((bits.flatten(1) & 1) << 4)
