"""Rotary position embedding over interleaved pairs: seven rope types, with phases relative to the attention chunk.

Frequencies are computed in float64. Within an attention chunk, rotary attention depends only on relative positions, so
position p gets the phase of p % attention_chunk_size: equal in exact arithmetic, and still precise at ten million
tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import RopeParameters, TextConfig
from model.errors import LengthError
from model.transfers import to_device


def rotary_frequencies(config: TextConfig, length: int) -> tuple[Tensor, float]:
    """Radians per token for each pair, (head_dim // 2,) float64, and the scale on cosine and sine.

    `length` is the token count of the whole run, by which longrope chooses its table once. Raises LengthError if it
    exceeds max_position_embeddings with rope_type dynamic, whose frequencies would change with every further token.
    """
    rope = config.rope_parameters
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = rope.rope_theta**-pairs
    match rope.rope_type:
        case "default":
            return frequencies, 1.0
        case "linear":  # https://arxiv.org/abs/2306.15595
            return frequencies / _number(rope.factor), 1.0
        case "dynamic":  # equals default up to max_position_embeddings
            if length > config.max_position_embeddings:
                raise LengthError(
                    f"{length} tokens, but rope_type dynamic is supported only up to "
                    f"max_position_embeddings ({config.max_position_embeddings})"
                )
            return frequencies, 1.0
        case "yarn":
            return _yarn(config, frequencies)
        case "longrope":
            return _longrope(config, frequencies, length)
        case "llama3":
            return _llama3(rope, frequencies), 1.0
        case "factors":
            return frequencies / torch.tensor(rope.factors, dtype=torch.float64), 1.0
    raise AssertionError(rope.rope_type)


def _llama3(rope: RopeParameters, frequencies: Tensor) -> Tensor:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates in between (Llama 3.1).

    Released Scout files have low_freq_factor == high_freq_factor, so nothing is interpolated.
    """
    factor, low, high = (_number(x) for x in (rope.factor, rope.low_freq_factor, rope.high_freq_factor))
    turns = _number(rope.original_max_position_embeddings) * frequencies / (2 * math.pi)
    kept = (turns >= high).double() if low == high else ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def _yarn(config: TextConfig, frequencies: Tensor) -> tuple[Tensor, float]:
    """NTK-by-parts interpolation with attention factor (https://arxiv.org/abs/2309.00071)."""
    rope = config.rope_parameters
    original = _number(rope.original_max_position_embeddings)
    factor = rope.factor or config.max_position_embeddings / original

    def pair_of(turns: float) -> float:  # index of the pair that makes this many turns over the original length
        return config.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_of(rope.beta_fast or 32.0), pair_of(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(config.head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = rope.attention_factor
    if attention_factor is None:
        both = rope.mscale and rope.mscale_all_dim
        attention_factor = (
            magnitude(_number(rope.mscale)) / magnitude(_number(rope.mscale_all_dim)) if both else magnitude(1.0)
        )
    return frequencies * (kept + (1 - kept) / factor), attention_factor


def _longrope(config: TextConfig, frequencies: Tensor, length: int) -> tuple[Tensor, float]:
    """Per-pair factors from the short or the long table (https://arxiv.org/abs/2402.13753)."""
    rope = config.rope_parameters
    original = _number(rope.original_max_position_embeddings)
    table = rope.long_factor if length > original else rope.short_factor
    assert table is not None
    attention_factor = rope.attention_factor
    if attention_factor is None:
        factor = rope.factor or config.max_position_embeddings / original
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies / torch.tensor(table, dtype=torch.float64), attention_factor


def _number(value: float | None) -> float:
    assert value is not None  # model/config.py rejects a rope type without its fields
    return float(value)


def phases(config: TextConfig, start: int, stop: int, length: int, device: torch.device) -> Tensor:
    """Rotations as complex numbers, of the rope type's magnitude, for positions start .. stop - 1.

    Returns (T, head_dim // 2) complex64. `length` is as in `rotary_frequencies`. Raises LengthError.
    """
    frequencies, attention_factor = rotary_frequencies(config, length)
    positions = torch.arange(start, stop) % config.attention_chunk_size
    angles = positions[:, None] * frequencies  # float64, (T, D / 2)
    magnitude = torch.full_like(angles, attention_factor)
    return to_device(torch.polar(magnitude, angles).to(torch.complex64), device)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i + 1) of x (B, T, H, D) by `rotation` (T, D // 2) in float32; returns x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)
