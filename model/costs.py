"""Closed-form costs of the text model: parameters, operations and activation bytes. Imports no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from model.config import TextConfig


@dataclass(frozen=True)
class Operations:
    """Useful floating-point operations by kind; a multiply-add counts as 2. Masked or skipped work is not counted."""

    linear: int
    chunked_attention: int
    full_attention: int

    @property
    def total(self) -> int:
        return self.linear + self.chunked_attention + self.full_attention


def layer_parameters(config: TextConfig, layer: int, *, active: bool = False) -> int:
    """Number of weights in one layer; with `active`, only those in the matrices that multiply a given token."""
    c, q, kv = config.hidden_size, query_size(config), kv_size(config)
    attention = c * q + 2 * c * kv + q * c
    expert = 3 * c * config.intermediate_size
    if config.is_moe(layer):
        used = config.num_experts_per_tok if active else config.num_local_experts
        feed_forward = c * config.num_local_experts + (used + 1) * expert
    else:
        feed_forward = 3 * c * config.intermediate_size_mlp
    biases_and_norms = 2 * c + (q + 2 * kv + c if config.attention_bias else 0)
    return attention + feed_forward + (0 if active else biases_and_norms)


def parameter_count(config: TextConfig) -> int:
    """Number of weights in the text model; tied embeddings count once."""
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    layers = sum(layer_parameters(config, layer) for layer in range(config.num_hidden_layers))
    return embeddings + config.hidden_size + layers


def weights_a_token(config: TextConfig) -> int:
    """Number of weights that a forward of one token multiplies, output matrix included."""
    return _multiplied(config, config.num_hidden_layers) + config.vocab_size * config.hidden_size


@functools.lru_cache(64)  # asked for each step of a plan
def _multiplied(config: TextConfig, layers: int) -> int:
    """Number of weights that one token is multiplied with in the first `layers` layers."""
    return sum(layer_parameters(config, layer, active=True) for layer in range(layers))


def weights_of_another_token(config: TextConfig) -> int:
    """How many more a forward of two tokens is expected to multiply, with tokens spread evenly over the experts."""
    used = config.num_experts_per_tok
    expert = 3 * config.hidden_size * config.intermediate_size
    others = config.num_local_experts - used
    return len(config.moe_layers) * used * expert * others // config.num_local_experts


def answering_operations(config: TextConfig, tokens: int) -> int:
    """Operations of a forward of one token behind `tokens` others, logits included."""
    seen = config.num_nope_layers * tokens + config.num_rope_layers * min(tokens, config.attention_chunk_size)
    return 2 * weights_a_token(config) + 4 * query_size(config) * seen


def reading_operations(config: TextConfig, start: int, stop: int) -> Operations:
    """Operations to prefill tokens start .. stop - 1: in the last layer only keys and values, and no logits."""
    tokens = stop - start
    last = config.num_hidden_layers - 1
    linear = 2 * tokens * _multiplied(config, last)
    linear += 2 * tokens * 2 * config.hidden_size * kv_size(config)
    per_pair = 4 * query_size(config)  # 2 multiply-adds an element: queries with keys, weights with values
    flags = config.no_rope_layers[:last]
    chunked = sum(flags) * per_pair * (chunked_pairs(config, stop) - chunked_pairs(config, start))
    full = (last - sum(flags)) * per_pair * (_causal_pairs(stop) - _causal_pairs(start))
    return Operations(linear, chunked, full)


def activation_bytes(config: TextConfig, tokens: int, itemsize: int, meeting: int | None = None) -> int:
    """Upper estimate of peak memory in one forward of `tokens` tokens besides weights and KV cache, in bytes.

    The larger of attention (residual stream, its norm, projections; the output and a segment's partial result being
    merged in float32) and a feed-forward whose tokens are all routed to one expert. `meeting` is what attention takes
    instead of merging where context ranks meet (`model.context_division.meeting_bytes`).
    """
    c, q, kv = config.hidden_size, query_size(config), kv_size(config)
    attention = tokens * (2 * c + q + 2 * kv) * itemsize
    attention += max(meeting or 0, merging_bytes(config, tokens))
    copies = config.num_experts_per_tok if config.moe_layers else 0
    dense = config.intermediate_size_mlp if len(config.moe_layers) < config.num_hidden_layers else 0
    feed_forward = (5 * c + 2 * copies * c + 3 * max(config.intermediate_size * copies, dense)) * itemsize
    return max(attention, tokens * feed_forward) + config.vocab_size * 4


def merging_bytes(config: TextConfig, tokens: int) -> int:
    """What merging a segment's partial result with the output takes, in float32."""
    widest = max(query_size(config), kv_size(config))
    return tokens * (5 * widest * 4 + 28 * config.num_attention_heads + 4 * config.head_dim)


def query_size(config: TextConfig) -> int:
    return config.num_attention_heads * config.head_dim


def kv_size(config: TextConfig) -> int:
    return config.num_key_value_heads * config.head_dim


def _causal_pairs(tokens: int) -> int:
    """Query-key pairs of causal attention over the first `tokens` positions."""
    return tokens * (tokens + 1) // 2


def chunked_pairs(config: TextConfig, tokens: int) -> int:
    """Query-key pairs of one RoPE layer over the first `tokens` positions."""
    chunks, rest = divmod(tokens, config.attention_chunk_size)
    return chunks * _causal_pairs(config.attention_chunk_size) + _causal_pairs(rest)
