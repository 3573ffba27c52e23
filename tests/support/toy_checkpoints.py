"""Random toy checkpoints in the published format, written by `transformers`, each with its in-memory oracle.

All sizes differ from one another, so that a swapped axis fails. Knows nothing of our loader or model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
)

from support.error_budget import difference, in_float64, limit_by

CHUNK, FLOOR_SCALE, VOCABULARY = 7, 9, 97
IMAGE_TOKEN = VOCABULARY - 1
SCALES = (0.02, 0.25)  # small weights hide errors of attention, large ones errors of eps
MANY_ROWS = (1, 61)  # batch, length
LENGTHS = (5, CHUNK, 2 * CHUNK + 1, 61)  # within a chunk, exactly one, several, past six temperature steps

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "intermediate_size": 22,
    "intermediate_size_mlp": 34,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 1,
    "attention_chunk_size": CHUNK,
    "floor_scale": FLOOR_SCALE,
    "attn_scale": 0.1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "use_qk_norm": True,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
}
DIVISIBLE = BASE | {
    "hidden_size": 48,
    "intermediate_size": 128,
    "intermediate_size_mlp": 192,
    "head_dim": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 3,
}
"""Groups of 16 and blocks end where two ranks do, and where four do; all sizes differ."""
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 12,
    "projector_input_dim": 12,
    "projector_output_dim": 12,
}


def rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 300.0, **fields}}


LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.7, 2.1], "long_factor": [1.5, 2.0, 3.0, 5.0, 9.0]}


@dataclass(frozen=True)
class Kind:
    """One named configuration: its differences from BASE, and how it is stored."""

    changes: dict[str, Any] = field(default_factory=dict)
    nested: bool = False
    vision: dict[str, Any] = field(default_factory=lambda: VISION)  # of a nested configuration
    max_shard_size: str = "5GB"
    dtype: torch.dtype = torch.float32


SCOUT = rope("llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=64)
MAVERICK = {"interleave_moe_layer_step": 2, "use_qk_norm": False}

KINDS: dict[str, Kind] = {
    "scout": Kind(SCOUT),
    "scout_old": Kind(
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40)
    ),
    "maverick": Kind(MAVERICK),
    "top_2": Kind({"num_experts_per_tok": 2}),
    "top_3": Kind({"num_experts_per_tok": 3, **MAVERICK}),
    "nope_first": Kind({"no_rope_layers": [0, 1, 1, 0, 0, 1, 0, 1]}),
    "nope_only_last": Kind({"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4}),
    "moe_listed": Kind({"moe_layers": [0, 3, 4]}),
    "moe_none": Kind({"moe_layers": [], **SCOUT}),
    "tied": Kind({"tie_word_embeddings": True}),
    "biases": Kind({"attention_bias": True}),
    "rope_linear": Kind(rope("linear", factor=3.0)),
    "rope_dynamic": Kind(rope("dynamic", factor=4.0)),
    "rope_yarn": Kind(rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "rope_yarn_mscale": Kind(
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            mscale=1.3,
            mscale_all_dim=0.6,
            beta_fast=20.0,
            beta_slow=2.0,
        )
        | {"use_qk_norm": False}
    ),
    "rope_yarn_untruncated": Kind(
        rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False, attention_factor=0.8)
        | {"use_qk_norm": False}
    ),
    "rope_longrope_short": Kind(rope("longrope", factor=2.0, original_max_position_embeddings=128, **LONGROPE)),
    "rope_longrope_long": Kind(
        rope("longrope", factor=2.5, original_max_position_embeddings=20, **LONGROPE) | {"use_qk_norm": False}
    ),
    "no_temperature": Kind({"attn_temperature_tuning": False}),
    "one_kv_head": Kind({"num_key_value_heads": 1}),
    "equal_heads": Kind({"num_key_value_heads": 6}),
    "nested": Kind(SCOUT, nested=True),
    "nested_sharded": Kind(MAVERICK, nested=True, max_shard_size="100KB"),
    "bfloat16": Kind(SCOUT, dtype=torch.bfloat16),
}

ROTATIONS = {name for name in KINDS if name.startswith("rope_") and name != "rope_yarn"}
"""Kinds that differ in their rotations alone, which tests/model/test_rope.py compares: whole models with -m matrix."""

MATRIX = ROTATIONS | {"moe_listed", "tied", "nested", "nested_sharded"}
"""Kinds whose attention and cache are those of another one: tests of every kind may leave them to -m matrix."""


@dataclass(frozen=True)
class Toy:
    """A checkpoint folder and the `transformers` model that wrote it."""

    name: str
    folder: Path
    oracle: Llama4ForCausalLM | Llama4ForConditionalGeneration

    @functools.cache  # noqa: B019 (as long-lived as the session's toys)
    def case(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, T), and the oracle's logits (B, T, V) from a full float64 forward without a cache."""
        generator = torch.Generator().manual_seed(1000 * batch + length)
        ids = torch.randint(VOCABULARY, (batch, length), generator=generator)
        return ids, in_float64(self.oracle, lambda oracle: oracle(ids, use_cache=False).logits)

    @functools.cache  # noqa: B019
    def limit(self, batch: int, length: int) -> float:
        """The largest allowed `error_budget.difference` from the case's logits in float32.

        A few rows may have small errors by luck, so the errors of many rows count too.
        """
        return limit_by(*(error for case in {(batch, length), MANY_ROWS} for error in self.errors(*case)))

    @functools.cache  # noqa: B019
    def errors(self, batch: int, length: int) -> list[float]:
        """The errors of the float32 oracle, for both of its attention implementations."""
        ids, expected = self.case(batch, length)
        found = []
        for attention in ("sdpa", "eager"):
            self.oracle.set_attn_implementation(attention)
            with torch.no_grad():
                found.append(difference(self.oracle(ids, use_cache=False).logits, expected))
        return found


Toys = Callable[[str, float], Toy]


def oracle_model(kind: Kind, std: float, seed: int) -> Llama4ForCausalLM | Llama4ForConditionalGeneration:
    """A `transformers` model with eager attention and random weights of `std`; norm weights are around 1."""
    text = Llama4TextConfig(**(BASE | kind.changes))
    if kind.nested:
        vision = Llama4VisionConfig(**kind.vision)
        model = Llama4ForConditionalGeneration(
            Llama4Config(
                text_config=text.to_dict(),
                vision_config=vision.to_dict(),
                image_token_index=IMAGE_TOKEN,
                tie_word_embeddings=text.tie_word_embeddings,
            )
        )
    else:
        model = Llama4ForCausalLM(text)
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # all of them, because attention biases start as zeros
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name
            parameter.copy_(1 + 0.2 * noise if is_norm else std * noise)
            if kind.dtype != torch.float32:
                parameter.copy_(parameter.to(kind.dtype))  # round as stored, so that writing loses nothing
    return model.eval()


def write_toy(folder: Path, name: str, std: float) -> Toy:
    """Writes the named checkpoint into `folder` (created)."""
    return write_kind(folder, name, KINDS[name], std, seed=list(KINDS).index(name))


def write_kind(folder: Path, name: str, kind: Kind, std: float, seed: int) -> Toy:
    """Writes a checkpoint of any kind, called `name`, into `folder` (created)."""
    model = oracle_model(kind, std, seed)
    stored = model
    if kind.dtype != torch.float32:
        stored = copy.deepcopy(model).to(kind.dtype)  # a copy: the oracle's rotary frequencies stay in float32
    stored.save_pretrained(folder, max_shard_size=kind.max_shard_size)
    return Toy(name, folder, model)
