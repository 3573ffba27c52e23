"""A decoder layer for a few tokens as a sequence of Triton kernels, and the buffers that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from model.config import TextConfig
from model.gpu.kernels import (
    attention_kernel,
    combine_kernel,
    down_kernel,
    gate_up_kernel,
    heads_kernel,
    linear_kernel,
    residual_kernel,
    router_kernel,
)
from model.gpu.support import ENTRY, MAX_TOKENS

ROWS = 16
"""Rows of a tile: the least that tensor cores multiply."""

LINEAR = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
EXPERTS = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
INNER_SPLITS = 4
"""Programs that share the inner dimension of an expert's second product, whose outer one is narrow."""

LEAST_SPLIT_TOKENS, MOST_SPLITS, KEYS = 256, 512, 64
"""Keys for one program of attention at least; programs for each KV head; keys at a time."""

MERGED_SPLITS = 32


class Buffers:
    """For up to MAX_TOKENS tokens, on the device."""

    def __init__(
        self, config: TextConfig, dtype: torch.dtype, device: torch.device, page_tokens: Sequence[int], length: int
    ) -> None:
        """`page_tokens` by layer, of caches of at most `length` tokens."""
        c, d, tokens = config.hidden_size, config.head_dim, MAX_TOKENS
        h, h_kv, top_k = config.num_attention_heads, config.num_key_value_heads, config.num_experts_per_tok
        chunk = min(config.attention_chunk_size, length)
        held = [chunk if config.uses_rope(layer) else length for layer in range(config.num_hidden_layers)]
        self.page_tokens = list(page_tokens)
        self.split_tokens = [_split_tokens(page, tokens) for page, tokens in zip(page_tokens, held, strict=True)]
        self.splits = [-(-tokens // split) for tokens, split in zip(held, self.split_tokens, strict=True)]
        most = max(-(-tokens // page) for page, tokens in zip(page_tokens, held, strict=True))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.ids, self.position = empty(tokens, dtype=torch.int64), empty(1, dtype=torch.int64)
        self.table = torch.zeros(config.num_hidden_layers, most, ENTRY, dtype=torch.int64, device=device)
        self.phases = empty(chunk, d)
        self.residual, self.normed = empty(tokens, c), empty(tokens, c, dtype=dtype)
        self.sums = empty(INNER_SPLITS * tokens, max((h + 2 * h_kv) * d, c))
        self.queries, self.attended = (empty(tokens, h * d, dtype=dtype) for _ in range(2))
        self.parts = empty(max(self.splits) * tokens, h, d)
        self.part_lse = empty(max(self.splits) * tokens, h)
        self.logits = empty(tokens, max(1, config.num_local_experts))
        self.gated = empty(tokens, max(config.intermediate_size, config.intermediate_size_mlp), dtype=dtype)
        self.gated_pairs = empty(tokens * top_k, config.intermediate_size, dtype=dtype)
        self.pair_sums = empty(INNER_SPLITS * tokens * top_k, c)


def _split_tokens(page_tokens: int, tokens: int) -> int:
    """Keys of one program: a part of a page, so large that there are not more programs than are needed."""
    size = page_tokens
    while size % 2 == 0 and size // 2 >= LEAST_SPLIT_TOKENS and -(-tokens // (size // 2)) <= MOST_SPLITS:
        size //= 2
    return size


def step(model: Any, buffers: Buffers, embedded: Tensor) -> Tensor:
    """Embeddings (T, C) of the tokens at `buffers.position` -> logits (1, T, V); keys and values are stored."""
    config, trunk, t = model.config, model.model, len(embedded)
    buffers.residual[:t].copy_(embedded)
    _residual(buffers, config, trunk.layers[0].input_layernorm, t, sums=0, pair_sums=0)
    for number, layer in enumerate(trunk.layers):
        _attention(buffers, config, number, layer, t)
        _residual(buffers, config, layer.post_attention_layernorm, t, sums=1, pair_sums=0)
        routed = _feed_forward(buffers, config, layer.feed_forward, t)
        behind = [*trunk.layers, None][number + 1]
        norm = trunk.norm if behind is None else behind.input_layernorm
        _residual(buffers, config, norm, t, sums=INNER_SPLITS, pair_sums=INNER_SPLITS if routed else 0)
    logits = torch.empty(1, t, config.vocab_size, device=embedded.device)
    _linear(buffers.normed, [model.lm_head.weight], logits, t)
    return logits.to(model.dtype)


def _linear(x: Tensor, weights: Sequence[Tensor], out: Tensor, t: int) -> None:
    """Products of x (>= T, K) with up to three matrices (N_i, K) -> (T, sum of N_i), float32."""
    sizes = [len(weight) for weight in weights] + [0] * (3 - len(weights))
    padded = [*weights, weights[0], weights[0]][:3]
    blocks = sum(triton.cdiv(size, LINEAR["BLOCK_N"]) for size in sizes)
    linear_kernel[(blocks,)](x, *padded, out, t, *sizes, weights[0].shape[1], ROWS, **LINEAR)


def _attention(buffers: Buffers, config: TextConfig, number: int, layer: Any, t: int) -> None:
    """From `normed` to the output projection, in `sums`."""
    attention, uses_rope = layer.self_attn, config.uses_rope(number)
    h, h_kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    chunk = config.attention_chunk_size if uses_rope else 0
    _linear(buffers.normed, [x.weight for x in (attention.q_proj, attention.k_proj, attention.v_proj)], buffers.sums, t)
    table, page_tokens, split_tokens = (
        buffers.table[number],
        buffers.page_tokens[number],
        buffers.split_tokens[number],
    )
    heads_kernel[(t, h + 2 * h_kv)](
        buffers.sums, buffers.position, buffers.phases, table, buffers.queries, t, page_tokens, config.rms_norm_eps,
        config.attn_scale, config.floor_scale, h, h_kv, d, triton.next_power_of_2(d) // 2, chunk,
        attention.qk_norm_eps is not None, attention.tunes_temperature, num_warps=1,
    )  # fmt: skip
    width = max(16, triton.next_power_of_2(d))
    row_blocks = triton.cdiv(t, ROWS // (h // h_kv))
    attention_kernel[(buffers.splits[number], h_kv, row_blocks)](
        buffers.queries, buffers.position, table, buffers.parts, buffers.part_lse, t, page_tokens, split_tokens,
        d**-0.5 * 1.4426950408889634, h, h_kv, d, width, chunk,
        ROWS, KEYS, num_warps=4, num_stages=3,
    )  # fmt: skip
    combine_kernel[(t, h)](
        buffers.parts, buffers.part_lse, buffers.position, buffers.attended, t, split_tokens, h, d, width, chunk,
        MERGED_SPLITS, num_warps=4,
    )  # fmt: skip
    _linear(buffers.attended, [attention.o_proj.weight], buffers.sums, t)


def _feed_forward(buffers: Buffers, config: TextConfig, forward: Any, t: int) -> bool:
    """From `normed` to `sums`, and for routed experts to `pair_sums`; whether there are any."""
    dense = getattr(forward, "shared_expert", forward)
    is_moe, c, size = dense is not forward, config.hidden_size, len(dense.gate_proj.weight)
    count, top_k, pairs = (forward.router.out_features, forward.top_k, t * forward.top_k) if is_moe else (1, 1, 0)
    gate_up = forward.experts.gate_up_proj if is_moe else dense.gate_proj.weight[None]
    down = forward.experts.down_proj if is_moe else dense.down_proj.weight[None]
    routed_size, width = (down.shape[1] if is_moe else 0), max(2, triton.next_power_of_2(count))
    if is_moe:
        router_kernel[(t, count)](
            buffers.normed, forward.router.weight, buffers.logits, c, count, triton.next_power_of_2(c), num_warps=4
        )
    wide = triton.cdiv(max(size, routed_size), EXPERTS["BLOCK_N"])
    gate_up_kernel[(wide, 1 + pairs)](
        buffers.normed, dense.gate_proj.weight, dense.up_proj.weight, gate_up, buffers.logits, buffers.gated,
        buffers.gated_pairs, t, c, size, routed_size, count, *gate_up.stride(), ROWS, TOP_K=top_k, WIDTH=width,
        **EXPERTS,
    )  # fmt: skip
    down_kernel[(triton.cdiv(c, EXPERTS["BLOCK_N"]), INNER_SPLITS, 1 + pairs)](
        buffers.gated, buffers.gated_pairs, dense.down_proj.weight, down, buffers.logits, buffers.sums,
        buffers.pair_sums, t, c, size, routed_size, count, *down.stride(), ROWS, SPLITS=INNER_SPLITS, TOP_K=top_k,
        WIDTH=width, **EXPERTS,
    )  # fmt: skip
    return is_moe


def _residual(buffers: Buffers, config: TextConfig, norm: Any, t: int, *, sums: int, pair_sums: int) -> None:
    """Adds so many partial sums, and norms."""
    c = config.hidden_size
    residual_kernel[(t,)](
        buffers.residual, buffers.sums, buffers.pair_sums, norm.weight, buffers.normed, c, t, norm.eps, sums,
        pair_sums, config.num_experts_per_tok, triton.next_power_of_2(c), num_warps=8,
    )  # fmt: skip
