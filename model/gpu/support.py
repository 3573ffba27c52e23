"""Which models steps of a few tokens can be recorded for, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class Pages:
    """Where the keys and values of all layers lie: the same object as long as nothing has moved."""

    def __init__(self, layers: Sequence[LayerPages]) -> None:
        self.layers = layers


def has_kernels(model: Any) -> bool:
    """Whether there are kernels for a Transformer's computing dtype and sizes, and nothing hooks into its layers."""
    config: TextConfig = model.config
    if model.dtype not in (torch.bfloat16, torch.float16) or config.attention_bias:
        return False
    if config.head_dim % 2 or config.head_dim > MAX_HEAD_DIM or config.num_local_experts > MAX_EXPERTS:
        return False
    if config.num_attention_heads // config.num_key_value_heads > MAX_GROUP:
        return False
    if any(part._forward_hooks for part in model.modules()):
        return False
    return all(x.device == model.device for part in (model.parameters(), model.buffers()) for x in part)
