"""The tensors of a GGUF file by the names that they have in Transformer. Imports no torch."""

from __future__ import annotations

import re

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, one a pair: part of the configuration, not a weight."""
GGUF_VISION_PREFIXES = ("v.", "mm.")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_shexp": "feed_forward.shared_expert.gate_proj",
    "ffn_up_shexp": "feed_forward.shared_expert.up_proj",
    "ffn_down_shexp": "feed_forward.shared_expert.down_proj",
    "ffn_gate_exps": "feed_forward.experts.gate_proj",
    "ffn_up_exps": "feed_forward.experts.up_proj",
    "ffn_down_exps": "feed_forward.experts.down_proj",
}
_STORED_TOP = {ours: stored for stored, ours in _TOP.items()}
_STORED_OF_LAYER = {ours: stored for stored, ours in _OF_LAYER.items()}
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.weight")


def weight_name(stored: str) -> str | None:
    """The weight's name in Transformer, with stacked experts as in model.weights.expert_parts; None for others.

    Rows of q and k are in the order of interleaved pairs, as Llama 4's are: files of the architecture llama4 keep it,
    and those of llama are converted to it.
    """
    if (found := _BLOCK.fullmatch(stored)) is not None:
        ours = _OF_LAYER.get(found[2])
        return None if ours is None else f"model.layers.{found[1]}.{ours}.weight"
    ours = _TOP.get(stored.removesuffix(".weight"))
    return None if ours is None or not stored.endswith(".weight") else f"{ours}.weight"


def stored_name(weight: str) -> str:
    """The reverse: a weight's name in a file, for messages."""
    if (found := _LAYER.fullmatch(weight)) is not None:
        stored = _STORED_OF_LAYER.get(found[2])
        return weight if stored is None else f"blk.{found[1]}.{stored}.weight"
    stored = _STORED_TOP.get(weight.removesuffix(".weight"))
    return weight if stored is None else f"{stored}.weight"
