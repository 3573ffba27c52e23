"""A decoder layer for a few tokens as a sequence of Triton kernels, and the buffers that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from model.config import TextConfig
from model.gpu.forms import INT4_WORDS, PLAIN, Form
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
from model.gpu.layer_forms import LayerForms, form_of
from model.gpu.support import ENTRY, MAX_TOKENS

ROWS = 16
"""Rows of a tile: the least that tensor cores multiply."""

LINEAR = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
EXPERTS = {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
OF_CODES = {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
"""Tiles, measured on an H200."""

LEAST_OF_WORDS = 64
"""Elements of a block of 4-bit codes along K: each quarter of them is a product, of 16 or more."""

INNER_SPLITS = 4
"""Programs that share the inner dimension of an expert's second product, whose outer one is narrow."""

LEAST_SPLIT_TOKENS, MOST_SPLITS, KEYS = 256, 256, 64
"""Keys for one program of attention at least; programs for each KV head; keys at a time."""

MERGED_SPLITS = 32

LOG2_E = math.log2(math.e)


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
        self.experts: list[Tensor] = []  # by layer, the addresses of matrices
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


def step(model: Any, forms: Sequence[LayerForms], buffers: Buffers, embedded: Tensor) -> Tensor:
    """Embeddings (T, C) of the tokens at `buffers.position` -> logits (1, T, V); keys and values are stored."""
    config, trunk, t = model.config, model.model, len(embedded)
    buffers.residual[:t].copy_(embedded)
    _residual(buffers, config, trunk.layers[0].input_layernorm, t, sums=0, pair_sums=0)
    for number, (layer, form) in enumerate(zip(trunk.layers, forms, strict=True)):
        _attention(buffers, config, number, layer.self_attn, form, t)
        _residual(buffers, config, layer.post_attention_layernorm, t, sums=1, pair_sums=0)
        routed = _feed_forward(buffers, config, number, layer.feed_forward, form, t)
        behind = [*trunk.layers, None][number + 1]
        norm = trunk.norm if behind is None else behind.input_layernorm
        _residual(buffers, config, norm, t, sums=INNER_SPLITS, pair_sums=INNER_SPLITS if routed else 0)
    logits = torch.empty(1, t, config.vocab_size, device=embedded.device)
    head = form_of(model.lm_head.weight)
    assert head is not None
    _linear(buffers.normed, [head], logits, t)
    return logits.to(model.dtype)


def _linear(x: Tensor, forms: Sequence[Form], out: Tensor, t: int) -> None:
    """Products of x (>= T, K) with up to three matrices (N_i, K), stored alike -> (T, sum of N_i), float32."""
    first = forms[0]
    sizes = [form.shape[0] for form in forms] + [0] * (3 - len(forms))
    padded = [*forms, first, first][:3]
    tiles = _tiles(LINEAR, first)
    blocks = sum(triton.cdiv(size, tiles["BLOCK_N"]) for size in sizes)
    linear_kernel[(blocks,)](
        x, *(form.codes for form in padded), *(form.scale for form in padded), out, t, *sizes, first.shape[1],
        *first.strides, *first.scale_strides, first.kind, first.group, ROWS, **tiles,
    )  # fmt: skip


def _tiles(plain: dict[str, int], *forms: Form) -> dict[str, int]:
    """Tiles for matrices of these forms: of codes within a group along K."""
    if all(form.kind == PLAIN for form in forms):
        return plain
    least = min(form.group for form in forms if form.kind != PLAIN)
    block_k = min(OF_CODES["BLOCK_K"], least & -least)
    if any(form.kind == INT4_WORDS for form in forms):
        block_k = max(block_k, LEAST_OF_WORDS)
    return OF_CODES | {"BLOCK_K": block_k}


def _attention(buffers: Buffers, config: TextConfig, number: int, attention: Any, form: LayerForms, t: int) -> None:
    """From `normed` to the output projection, in `sums`."""
    h, h_kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    chunk = config.attention_chunk_size if config.uses_rope(number) else 0
    table, page_tokens, split_tokens = (
        buffers.table[number],
        buffers.page_tokens[number],
        buffers.split_tokens[number],
    )
    _linear(buffers.normed, form.projections, buffers.sums, t)
    heads_kernel[(t, h + 2 * h_kv)](
        buffers.sums, buffers.position, buffers.phases, table, buffers.queries, t, page_tokens, config.rms_norm_eps,
        config.attn_scale, config.floor_scale, h, h_kv, d, triton.next_power_of_2(d) // 2, chunk,
        attention.qk_norm_eps is not None, attention.tunes_temperature, num_warps=1,
    )  # fmt: skip
    width = max(16, triton.next_power_of_2(d))
    row_blocks = triton.cdiv(t, ROWS // (h // h_kv))
    attention_kernel[(buffers.splits[number], h_kv, row_blocks)](
        buffers.queries, buffers.position, table, buffers.parts, buffers.part_lse, t, page_tokens, split_tokens,
        d**-0.5 * LOG2_E, h, h_kv, d, width, chunk, ROWS, KEYS, num_warps=4, num_stages=3,
    )  # fmt: skip
    combine_kernel[(t, h)](
        buffers.parts, buffers.part_lse, buffers.position, buffers.attended, t, split_tokens, h, d, width, chunk,
        MERGED_SPLITS, num_warps=4,
    )  # fmt: skip
    _linear(buffers.attended, [form.output], buffers.sums, t)


def _feed_forward(buffers: Buffers, config: TextConfig, number: int, forward: Any, form: LayerForms, t: int) -> bool:
    """From `normed` to `sums`, and for routed experts to `pair_sums`; whether there are any."""
    *routed, dense = form.experts
    c, count, table = config.hidden_size, len(routed), buffers.experts[number]
    one = routed[0] if routed else dense  # of those that are stored alike
    top_k = forward.top_k if routed else 1
    pairs = t * top_k if routed else 0
    size, routed_size = dense[0].shape[0], (one[0].shape[0] if routed else 0)
    if routed:
        router_kernel[(t, count)](
            buffers.normed, forward.router.weight, buffers.logits, c, count, triton.next_power_of_2(c), num_warps=4
        )
    sizes = (t, c, size, routed_size, count)
    more = {"TOP_K": top_k, "WIDTH": max(2, triton.next_power_of_2(count)), "ALIGNED": _is_aligned(form)}
    tiles = _tiles(EXPERTS, dense[0], one[0])
    gate_up_kernel[(triton.cdiv(max(size, routed_size), tiles["BLOCK_N"]), 1 + pairs)](
        buffers.normed, buffers.gated, buffers.gated_pairs, buffers.logits, table,
        *_about(dense[0], one[0], sizes), ROWS=ROWS, **tiles, **more,
    )  # fmt: skip
    tiles = _tiles(EXPERTS, dense[2], one[2])
    down_kernel[(triton.cdiv(c, tiles["BLOCK_N"]), INNER_SPLITS, 1 + pairs)](
        buffers.gated, buffers.gated_pairs, buffers.sums, buffers.pair_sums, buffers.logits, table,
        *_about(dense[2], one[2], sizes), ROWS=ROWS, SPLITS=INNER_SPLITS, **tiles, **more,
    )  # fmt: skip
    return bool(routed)


def _about(dense: Form, routed: Form, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments of the experts' kernels: types of addresses, sizes, strides, and how matrices are stored."""
    both = (dense, routed)
    likes = [tensor for form in both for tensor in (form.codes, form.scale)]
    strides = [x for form in both for x in (*form.strides, *form.scale_strides)]
    return (*likes, *sizes, *strides, dense.kind, dense.group, routed.kind, routed.group)


def _is_aligned(form: LayerForms) -> bool:
    """Whether all matrices of experts begin at multiples of 16 bytes."""
    return not any(address % 16 for of in form.addresses for address in of[::2])


def _residual(buffers: Buffers, config: TextConfig, norm: Any, t: int, *, sums: int, pair_sums: int) -> None:
    """Adds so many partial sums, and norms."""
    c = config.hidden_size
    residual_kernel[(t,)](
        buffers.residual, buffers.sums, buffers.pair_sums, norm.weight, buffers.normed, c, t, norm.eps, sums,
        pair_sums, config.num_experts_per_tok, triton.next_power_of_2(c), num_warps=8,
    )  # fmt: skip
