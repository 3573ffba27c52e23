"""How sealed segments of keys and values are stored: in the compute dtype, in another float type, or quantized.

A quantized element is a code, int8 or float8_e4m3fn, times a float32 scale. Keys have one scale per channel and token
group, values one per token. In `samples/tiny` int8 keys add an error of 1.7e-3 to the attention output (3.0e-3 with a
scale per token), int8 values one of 3.8e-3 (3.5e-3 with a scale per channel and group). Values are scaled per token all
the same: in a simulation with half of the attention on a sink, a token with values near zero, scales shared with its
neighbours made the error 0.27 instead of 0.006. See also https://arxiv.org/abs/2402.02750. fp8 takes the same bytes,
and its error is 2e-2 with any scales.

An element that is not finite visibly spoils everything that shares its scale. Float types clamp infinities and keep
NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cache.blocks import Block
from cache.layout import KV_DTYPES, QUANTIZED, StoreLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
assert TORCH_DTYPES.keys() == KV_DTYPES.keys()

KEY_SCALES_SHARED_OVER, VALUE_SCALES_SHARED_OVER = 3, 4
"""Dimensions of a segment seen as (B, H_kv, groups, group_tokens, D): the tokens of a group; the channels."""

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of groups of zeros, too
PIECE_BYTES = 2**20
"""What each CPU thread converts at a time, in float32: it stays in cache, and temporary memory stays bounded."""


class Packed(NamedTuple):
    """One layer's segment as stored: keys and values (B, H_kv, S, D) in the storage type. Quantized types have float32
    scales too: of keys (B, H_kv, S / group_tokens, D), of values (B, H_kv, S, 1)."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def to(self, place: Callable[[Tensor], Tensor]) -> Packed:
        """Each tensor as `place` returns it."""
        return Packed(**{name: place(tensor) for name, tensor in self.tensors})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors)

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """By name, in the order in which they lie in a file: scales first, so that all are aligned."""
        named = [
            ("key_scales", self.key_scales),
            ("value_scales", self.value_scales),
            ("keys", self.keys),
            ("values", self.values),
        ]
        return [(name, tensor) for name, tensor in named if tensor is not None]


def shapes(layout: StoreLayout) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, types and shapes of a sealed segment's tensors, in file order: `sealed_segment_bytes` in all."""
    b, h, s, d = shape = _segment_shape(layout)
    dtype = TORCH_DTYPES[layout.kv_dtype]
    stored: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("keys", dtype, shape), ("values", dtype, shape)]
    if layout.kv_dtype not in QUANTIZED:
        return stored
    return [
        ("key_scales", torch.float32, (b, h, s // layout.group_tokens, d)),
        ("value_scales", torch.float32, (b, h, s, 1)),
        *stored,
    ]


def pack(block: Block, layout: StoreLayout) -> Packed:
    """Converts a segment from the compute dtype to the stored form: the same tensors if the two are equal, else new
    contiguous ones."""
    assert block.keys.shape == block.values.shape == _segment_shape(layout), (block.keys.shape, block.values.shape)
    if not layout.is_packed:
        return Packed(*block)
    if layout.kv_dtype not in QUANTIZED:
        return Packed(*(_narrowed(x, TORCH_DTYPES[layout.kv_dtype]) for x in block))
    keys, key_scales = _quantized(block.keys, layout, KEY_SCALES_SHARED_OVER)
    values, value_scales = _quantized(block.values, layout, VALUE_SCALES_SHARED_OVER)
    return Packed(keys, values, key_scales[..., 0, :], value_scales.flatten(2, 3))


def unpack(packed: Packed, layout: StoreLayout, into: Block) -> Block:
    """The segment in the compute dtype: written to `into`, on the same device, or the same tensors if not converted."""
    if not layout.is_packed:
        return Block(packed.keys, packed.values)
    assert into.keys.shape == into.values.shape == packed.keys.shape, (into.keys.shape, packed.keys.shape)
    if packed.key_scales is None or packed.value_scales is None:
        into.keys.copy_(packed.keys)
        into.values.copy_(packed.values)
        return into
    _dequantize(packed.keys, packed.key_scales[..., None, :], layout, into.keys)
    _dequantize(packed.values, packed.value_scales.unflatten(2, (-1, layout.group_tokens)), layout, into.values)
    return into


def packed_from_bytes(buffer: Tensor, layout: StoreLayout) -> Packed:
    """Views of a segment's bytes at the beginning of `buffer`: uint8, one-dimensional, contiguous."""
    assert buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.is_contiguous(), (buffer.dtype, buffer.shape)
    assert buffer.shape[0] >= layout.sealed_segment_bytes, (buffer.shape[0], layout.sealed_segment_bytes)
    views = {}
    offset = 0
    for name, dtype, shape in shapes(layout):
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        views[name] = buffer[offset : offset + nbytes].view(dtype).view(shape)
        offset += nbytes
    return Packed(**views)


def _segment_shape(layout: StoreLayout) -> tuple[int, int, int, int]:
    config = layout.config
    return layout.batch_size, config.num_key_value_heads, layout.segment_tokens, config.head_dim


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another float type, clamped to values that are finite there and when converted back."""
    largest = torch.tensor(min(torch.finfo(x.dtype).max, torch.finfo(dtype).max), dtype=dtype)
    if largest.to(x.dtype).isinf():  # rounded up: 65504 in bfloat16
        largest = torch.nextafter(largest, largest.new_zeros(()))
    return x.to(dtype, memory_format=torch.contiguous_format).clamp_(-largest.item(), largest.item())


def _quantized(x: Tensor, layout: StoreLayout, shared_over: int) -> tuple[Tensor, Tensor]:
    """Codes (B, H_kv, S, D), and scales (B, H_kv, groups, group_tokens, D) with 1 for the dimension that shares them.

    The scale is absmax times 1 / largest code: with a division the largest float32 would come back as infinity.
    """
    dtype = TORCH_DTYPES[layout.kv_dtype]
    largest = LARGEST_CODE[dtype]
    grouped = x.unflatten(2, (-1, layout.group_tokens))
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    grouped_codes = codes.unflatten(2, (-1, layout.group_tokens))
    scales = torch.empty(
        [1 if i == shared_over else n for i, n in enumerate(grouped.shape)], dtype=torch.float32, device=x.device
    )
    for piece in _pieces(layout, x.device):
        elements, scale = grouped[:, :, piece].float(), scales[:, :, piece]
        absmax = torch.maximum(elements.amax(shared_over, keepdim=True), -elements.amin(shared_over, keepdim=True))
        scale.copy_(absmax.mul_(1 / largest).clamp_(min=SMALLEST_SCALE))
        scaled = elements / scale
        if dtype == torch.int8:
            scaled.round_()  # half to even
        grouped_codes[:, :, piece] = scaled.clamp_(-largest, largest)
    return codes, scales


def _dequantize(codes: Tensor, scales: Tensor, layout: StoreLayout, into: Tensor) -> None:
    """Codes (B, H_kv, S, D) times scales, which broadcast over (B, H_kv, groups, group_tokens, D), in float32."""
    grouped, grouped_codes = (x.unflatten(2, (-1, layout.group_tokens)) for x in (into, codes))
    for piece in _pieces(layout, codes.device):
        target, numbers, scale = grouped[:, :, piece], grouped_codes[:, :, piece], scales[:, :, piece]
        if codes.dtype == torch.float8_e4m3fn:
            numbers, scale = _fp8_as_float16(numbers), scale * 256
        target.copy_(numbers.float().mul_(scale))


def _fp8_as_float16(codes: Tensor) -> Tensor:
    """The codes / 256, exactly: the same exponent and mantissa bits in a type whose exponent bias is larger by 8.

    A cast is ten times as slow on a CPU. NaN codes become finite, but their scales are not.
    """
    signs_twice = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return signs_twice.bitwise_and_(~0x4000).view(torch.float16)


def _pieces(layout: StoreLayout, device: torch.device) -> Iterator[slice]:
    """Slices of the token groups, each converted at once: all of them on an accelerator."""
    b, h, s, d = _segment_shape(layout)
    groups = s // layout.group_tokens
    step = groups
    if device.type == "cpu":
        step = max(1, PIECE_BYTES * torch.get_num_threads() // (4 * b * h * layout.group_tokens * d))
    return (slice(start, start + step) for start in range(0, groups, step))
