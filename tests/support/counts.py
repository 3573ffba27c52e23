"""Numbers of weights, counted apart from the product."""

from __future__ import annotations

from model.config import TextConfig


def small_parameter_count(config: TextConfig) -> int:
    """Number of weights in norms, biases and routers, which are converted to the dtype that the model computes in."""
    c = config.hidden_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    a_layer = 2 * c + (q + 2 * kv + c if config.attention_bias else 0)
    return config.num_hidden_layers * a_layer + len(config.moe_layers) * c * config.num_local_experts + c
