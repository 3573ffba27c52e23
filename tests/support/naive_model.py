"""Textbook Llama 4: one token, one head, one expert at a time, in float64, from a checkpoint's raw tensors.

Independent of `transformers` and of our model: absolute phases, plain loops. Supports only rope_type default.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def naive_logits(config: Any, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """`config`: a `transformers` text config; `weights` by their names in the checkpoint; ids (T,) -> logits (T, V)."""
    w = {name.removeprefix("language_model."): tensor.double() for name, tensor in weights.items()}
    x = w["model.embed_tokens.weight"][ids]  # (T, C)
    for layer in range(config.num_hidden_layers):
        mine = {
            name.removeprefix(prefix): tensor
            for prefix in [f"model.layers.{layer}."]
            for name, tensor in w.items()
            if name.startswith(prefix)
        }
        x = x + attention(config, mine, layer, rms_norm(x, config.rms_norm_eps, mine["input_layernorm.weight"]))
        normed = rms_norm(x, config.rms_norm_eps, mine["post_attention_layernorm.weight"])
        x = x + torch.stack([feed_forward(config, mine, layer in config.moe_layers, token) for token in normed])
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms_norm(x, config.rms_norm_eps, w["model.norm.weight"]) @ head.T


def rms_norm(x: Tensor, eps: float, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(config: Any, w: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    """x (T, C) -> (T, C)."""
    uses_rope, d = config.no_rope_layers[layer] == 1, config.head_dim
    frequencies = [config.rope_parameters["rope_theta"] ** (-2 * i / d) for i in range(d // 2)]

    def projected(name: str) -> Tensor:  # (T, H, D)
        return (x @ w[f"self_attn.{name}.weight"].T + w.get(f"self_attn.{name}.bias", 0)).unflatten(-1, (-1, d))

    def positioned(heads: Tensor) -> Tensor:
        if not uses_rope:
            return heads
        turned = torch.empty_like(heads)
        for position in range(len(x)):
            for i, frequency in enumerate(frequencies):
                cos, sin = math.cos(position * frequency), math.sin(position * frequency)
                a, b = heads[position, :, 2 * i], heads[position, :, 2 * i + 1]
                turned[position, :, 2 * i] = a * cos - b * sin
                turned[position, :, 2 * i + 1] = a * sin + b * cos
        return rms_norm(turned, config.rms_norm_eps) if config.use_qk_norm else turned

    q, k, v = positioned(projected("q_proj")), positioned(projected("k_proj")), projected("v_proj")
    out = torch.empty_like(q)
    group = config.num_attention_heads // config.num_key_value_heads
    for position in range(len(x)):
        first = position // config.attention_chunk_size * config.attention_chunk_size if uses_rope else 0
        temperature = 1.0
        if not uses_rope and config.attn_temperature_tuning:
            temperature = 1 + config.attn_scale * math.log(1 + (position + 1) // config.floor_scale)
        for head in range(config.num_attention_heads):
            keys, values = k[first : position + 1, head // group], v[first : position + 1, head // group]
            scores = keys @ (q[position, head] * temperature) / math.sqrt(d)
            out[position, head] = scores.softmax(0) @ values
    return out.flatten(1) @ w["self_attn.o_proj.weight"].T + w.get("self_attn.o_proj.bias", 0)


def feed_forward(config: Any, w: dict[str, Tensor], is_moe: bool, x: Tensor) -> Tensor:
    """One token x (C,) -> (C,)."""
    if not is_moe:
        return gated(x, *(w[f"feed_forward.{name}_proj.weight"].T for name in ("gate", "up", "down")))
    out = gated(x, *(w[f"feed_forward.shared_expert.{name}_proj.weight"].T for name in ("gate", "up", "down")))
    logits = w["feed_forward.router.weight"] @ x
    for expert in logits.argsort(descending=True)[: config.num_experts_per_tok].tolist():
        fused, down = w["feed_forward.experts.gate_up_proj"][expert], w["feed_forward.experts.down_proj"][expert]
        gate, up = fused[:, : config.intermediate_size], fused[:, config.intermediate_size :]
        out = out + gated(x * logits[expert].sigmoid(), gate, up, down)
    return out


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = x @ gate
    return (hidden * hidden.sigmoid() * (x @ up)) @ down
