"""The training twin of `samples/tiny`: Llama 4's text model, differentiable, with the checkpoint's names.

Shares no code with the inference package `model`, so that each checks the other. Two features exist for training only:
the attention chunk is an argument, and NoPE keys can carry a bias that simulates thousands of times more filler than
fits into a training sequence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "intermediate_size_mlp": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "use_qk_norm": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 2048,
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "floor_scale": 8192,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 10485760,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    def __init__(self, uses_rope: bool) -> None:
        super().__init__()
        c, d = CONFIG["hidden_size"], CONFIG["head_dim"]
        self.heads, self.kv_heads, self.head_dim = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], d
        self.uses_rope = uses_rope
        self.q_proj = nn.Linear(c, self.heads * d, bias=False)
        self.k_proj = nn.Linear(c, self.kv_heads * d, bias=False)
        self.v_proj = nn.Linear(c, self.kv_heads * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, c, bias=False)

    def forward(self, x: Tensor, chunk: int, key_bias: Tensor, temperature: Tensor) -> Tensor:
        """x (B, T, C), T a multiple of `chunk`; key_bias (B, T); temperature (B,)."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, -1)
        k = self.k_proj(x).view(b, t, self.kv_heads, -1)
        v = self.v_proj(x).view(b, t, self.kv_heads, -1)
        if self.uses_rope:
            q, k = (_unit_rms(_rotate(y, chunk)) for y in (q, k))
            q, k, v = (y.reshape(b * t // chunk, chunk, y.shape[2], -1).transpose(1, 2) for y in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # the bias is an extra dimension of the keys, matched by a 1 in the queries
            scale = self.head_dim**-0.5
            q = F.pad(torch.cat([q * temperature.view(b, 1, 1, 1) * scale, torch.ones_like(q[..., :1])], -1), (0, 7))
            k = F.pad(torch.cat([k, key_bias.view(b, t, 1, 1).expand(-1, -1, self.kv_heads, 1)], -1), (0, 7))
            q, k, v = (y.transpose(1, 2) for y in (q, k, F.pad(v, (0, 8))))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=1.0)
            out = out[..., : self.head_dim]
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


def _rotate(x: Tensor, chunk: int) -> Tensor:
    """Rotary embedding of interleaved pairs, with positions counted within the chunk; x (B, T, H, D)."""
    t, d = x.shape[1], x.shape[-1]
    frequencies = CONFIG["rope_theta"] ** -(torch.arange(0, d, 2) / d)
    phases = (torch.arange(t) % chunk)[:, None] * frequencies
    cos, sin = phases.cos()[:, None], phases.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _unit_rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None, CONFIG["rms_norm_eps"])


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        c, i = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(c, i, bias=False), nn.Linear(c, i, bias=False)
        self.down_proj = nn.Linear(i, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        e, c, i = CONFIG["num_local_experts"], CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_up_proj = nn.Parameter(torch.empty(e, c, 2 * i))
        self.down_proj = nn.Parameter(torch.empty(e, i, c))


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(CONFIG["hidden_size"], CONFIG["num_local_experts"], bias=False)
        self.experts = Experts()
        self.shared_expert = MLP()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        score, expert = self.router(flat).max(-1)
        order = expert.argsort(stable=True)
        routed = (flat * score.sigmoid()[:, None])[order]
        outs = []
        for e, part in enumerate(routed.split(expert.bincount(minlength=CONFIG["num_local_experts"]).tolist())):
            gate, up = (part @ self.experts.gate_up_proj[e]).chunk(2, -1)
            outs.append((F.silu(gate) * up) @ self.experts.down_proj[e])
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return (self.shared_expert(flat) + torch.cat(outs)[inverse]).view_as(x)


class Layer(nn.Module):
    def __init__(self, uses_rope: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(CONFIG["hidden_size"])
        self.self_attn = Attention(uses_rope)
        self.post_attention_layernorm = RMSNorm(CONFIG["hidden_size"])
        self.feed_forward = MoE()

    def forward(self, x: Tensor, chunk: int, key_bias: Tensor, temperature: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), chunk, key_bias, temperature)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer(bool(flag)) for flag in CONFIG["no_rope_layers"])
        self.norm = RMSNorm(CONFIG["hidden_size"])


class TinyForTraining(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.model = Trunk(vocab_size)
        self.lm_head = nn.Linear(CONFIG["hidden_size"], vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                fan_in = p.shape[1] if p.ndim == 2 or "experts" in name else p.shape[-1]
                std = fan_in**-0.5
                if "o_proj" in name or "down_proj" in name:
                    std /= math.sqrt(2 * CONFIG["num_hidden_layers"])
                if "embed" in name:
                    std = 0.1
                nn.init.normal_(p, std=std)

    def forward(self, ids: Tensor, chunk: int, key_bias: Tensor, temperature: Tensor) -> Tensor:
        """ids (B, T) -> final normalised hidden states (B, T, C); apply `lm_head` where logits are wanted."""
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, chunk, key_bias, temperature)
        return self.model.norm(x)


def simulated_temperature(length: Tensor) -> Tensor:
    """The NoPE query scale at absolute position `length` (any shape), as the architecture defines it."""
    return torch.log1p(torch.floor((length + 1) / CONFIG["floor_scale"])) * CONFIG["attn_scale"] + 1
