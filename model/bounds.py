"""The largest numbers that a configuration may hold, and why. Imports no torch.

A checkpoint's configuration is read before its weights, so a few bytes of it could ask for any amount of memory and
time. Each bound is far above what published models have, and low enough that products of any of them stay in 64 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from model.errors import ConfigError


class Bound(NamedTuple):
    """The largest value, and the reason as it stands in the message."""

    most: int | float
    why: str


_POSITIONS = Bound(2**31 - 1, "positions are 32-bit numbers")
_TOKEN_IDS = Bound(2**24, "64 times the largest published vocabulary")
_WIDTH = Bound(2**20, "64 times the widest published model")
_INNER_WIDTH = Bound(2**22, "64 times the widest published model")
_HEADS = Bound(2**12, "32 times what published models have")
_PIXELS = Bound(2**16, "more than a picture of 4 gigapixels")
_FACTOR = Bound(1e6, "larger factors leave no precision")

BOUNDS: Mapping[str, Bound] = {
    "attention_chunk_size": _POSITIONS,
    "attn_scale": _FACTOR,
    "floor_scale": _POSITIONS,
    "head_dim": _HEADS,
    "hidden_size": _WIDTH,
    "image_size": _PIXELS,
    "image_token_index": _TOKEN_IDS,
    "interleave_moe_layer_step": _POSITIONS,
    "intermediate_size": _INNER_WIDTH,
    "intermediate_size_mlp": _INNER_WIDTH,
    "max_patches": Bound(256, "16 times what Llama 4 has"),
    "max_position_embeddings": _POSITIONS,
    "no_rope_layer_interval": _POSITIONS,
    "num_attention_heads": _HEADS,
    "num_channels": _PIXELS,
    "num_experts_per_tok": _HEADS,
    "num_hidden_layers": Bound(1000, "8 times the deepest published model; building a thousand takes a second"),
    "num_key_value_heads": _HEADS,
    "num_local_experts": _HEADS,
    "original_max_position_embeddings": _POSITIONS,
    "patch_size": _PIXELS,
    "pixel_shuffle_ratio": _FACTOR,
    "projector_input_dim": _WIDTH,
    "projector_output_dim": _WIDTH,
    "rms_norm_eps": Bound(1, "it keeps a division from overflowing"),
    "rope_theta": Bound(1e12, "a thousand times what published models have"),
    "vision_output_dim": _WIDTH,
    "vocab_size": _TOKEN_IDS,
}
"""By the names in config.json and preprocessor_config.json."""

ROPE_BOUND = _FACTOR
"""Of rope parameters that have none of their own."""


def check_bound(name: str, value: int | float, bound: Bound | None = None) -> None:
    """Raises ConfigError if a field's value is larger than its bound, by default the one in BOUNDS."""
    most, why = bound or BOUNDS[name]
    if value > most:
        raise ConfigError(f"{name}: {shown(value)} is more than {most:,} ({why})")


def shown(value: object) -> str:
    """A configuration value for an error message, truncated if it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; digits beyond what Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"
