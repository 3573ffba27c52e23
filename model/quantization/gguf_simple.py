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

import functools

import torch
from torch import Tensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the E2M1 values


def expand_q4_0(blocks: Tensor, out: Tensor) -> None:
    write_halves(nibbles(blocks[:, 2:18]).sub_(8).view(torch.int8), out)
    out.mul_(halves(blocks[:, :2]))


def expand_q4_1(blocks: Tensor, out: Tensor) -> None:
    write_halves(nibbles(blocks[:, 4:20]), out)
    out.mul_(halves(blocks[:, :2])).add_(halves(blocks[:, 2:4]))


def expand_q5_0(blocks: Tensor, out: Tensor) -> None:
    codes = nibbles(blocks[:, 6:22]).bitwise_or_(fifth_bits(blocks[:, 2:6]))
    write_halves(codes.sub_(16).view(torch.int8), out)
    out.mul_(halves(blocks[:, :2]))


def expand_q5_1(blocks: Tensor, out: Tensor) -> None:
    write_halves(nibbles(blocks[:, 8:24]).bitwise_or_(fifth_bits(blocks[:, 4:8])), out)
    out.mul_(halves(blocks[:, :2])).add_(halves(blocks[:, 2:4]))


def expand_q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:34].view(torch.int8))
    out.mul_(halves(blocks[:, :2]))


def expand_iq4_nl(blocks: Tensor, out: Tensor) -> None:
    look_up(nibbles(blocks[:, 2:18]), IQ4_VALUES, out)
    out.mul_(halves(blocks[:, :2]))


def expand_mxfp4(blocks: Tensor, out: Tensor) -> None:
    look_up(nibbles(blocks[:, 1:17]), MXFP4_VALUES, out)
    exponents = blocks[:, :1].int()  # of half the scale, as the values are doubled
    bits = torch.where(exponents < 2, (1 << 21) << exponents.clamp(max=1), (exponents - 1) << 23)
    out.mul_(bits.view(torch.float32))


def halves(stored: Tensor) -> Tensor:
    """float16 numbers in bytes (n, 2 k) -> float32 (n, k)."""
    return stored.view(torch.float16).float()


def planes(stored: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Bytes (...), shifted left by each number of bits and masked -> (shifts, ...). Negative is right.

    Operations on bytes are quick along contiguous memory only, so a plane holds the same bits of all blocks.
    """
    stored = stored.contiguous()
    out = stored.new_empty(len(shifts), *stored.shape)
    for plane, shift in zip(out, shifts, strict=True):
        if shift > 0:
            torch.bitwise_left_shift(stored, shift, out=plane)
        elif shift < 0:
            torch.bitwise_right_shift(stored, -shift, out=plane)
        else:
            plane.copy_(stored)
    return out.bitwise_and_(mask)


def nibbles(stored: Tensor) -> Tensor:
    """Bytes (...) -> their low and their high halves (2, ...)."""
    stored = stored.contiguous()
    out = stored.new_empty(2, *stored.shape)
    torch.bitwise_and(stored, 15, out=out[0])
    torch.bitwise_right_shift(stored, 4, out=out[1])
    return out


def fifth_bits(stored: Tensor) -> Tensor:
    """4 bytes of bits (n, 4) -> each at its place, 16, in a byte of its own (2, n, 16)."""
    index = stored.unflatten(1, (2, 2)).transpose(0, 1).reshape(-1).int()
    return spread_bits(stored.device).index_select(0, index).view(torch.uint8).view(2, -1, 16)


def look_up(codes: Tensor, values: tuple[int, ...], out: Tensor) -> None:
    """The values of codes (2, n, m), uint8 -> contiguous float32 `out` (n, 2 m)."""
    index = torch.empty(out.shape, dtype=torch.int32, device=out.device)
    write_halves(codes, index)
    torch.index_select(table(values, out.device), 0, index.view(-1), out=out.view(-1))


def write_halves(codes: Tensor, out: Tensor) -> None:
    """Codes (2, n, 16) -> `out` (n, 32), in its dtype."""
    out[:, :16] = codes[0]
    out[:, 16:] = codes[1]


@functools.cache
def table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def spread_bits(device: torch.device) -> Tensor:
    """For each byte, an int64 that has bit i at the place of 16 in byte i."""
    words = [sum((byte >> i & 1) << 8 * i + 4 for i in range(8)) for byte in range(256)]
    return torch.tensor(words, dtype=torch.int64, device=device)
