"""Which models steps of a few tokens can be recorded for, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import TextConfig

MAX_TOKENS = 8
"""Tokens of a step: an answer's next one, and those drafted behind it."""

ENTRY = 3
"""Numbers of a page: the addresses of its keys and values, and the elements between two heads."""

MAX_HEAD_DIM, MAX_EXPERTS, MAX_GROUP = 256, 1024, 16


class LayerPages(NamedTuple):
    """Where a layer's keys and values lie and the next ones will: pages of one length, but the last may be shorter."""

    page_tokens: int
    pages: Sequence[tuple[Tensor, Tensor]]  # keys and values (1, H_kv, S, D), contiguous


def is_recordable(model: Any) -> bool:
    """Whether the kernels compute all layers of a Transformer: 16-bit weights on its device, no bias, no hooks."""
    config: TextConfig = model.config
    if model.dtype not in (torch.bfloat16, torch.float16) or config.attention_bias:
        return False
    if config.head_dim % 2 or config.head_dim > MAX_HEAD_DIM or config.num_local_experts > MAX_EXPERTS:
        return False
    if config.num_attention_heads // config.num_key_value_heads > MAX_GROUP:
        return False
    if any(isinstance(part, nn.Module) and part._forward_hooks for part in model.modules()):
        return False
    tensors = [*model.parameters(), *model.buffers()]
    return (
        not any(model.buffers())
        and all(
            x.device == model.device and x.dtype == model.dtype and x.is_cuda == (model.device.type == "cuda")
            for x in tensors
        )
        and all(_is_plain(layer) for layer in model.model.layers)
    )


def _is_plain(layer: Any) -> bool:
    """Whether weights lie as the kernels read them: rows of matrices contiguous, experts in any strides."""
    forward = layer.feed_forward
    dense = getattr(forward, "shared_expert", forward)
    attention = layer.self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [dense.gate_proj, dense.up_proj, dense.down_proj]
    if dense is not forward:
        if not hasattr(forward.experts, "gate_up_proj"):
            return False
        linears.append(forward.router)
    return all(isinstance(x.weight, nn.Parameter) and x.weight.is_contiguous() for x in linears)
