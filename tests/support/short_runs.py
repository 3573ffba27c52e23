"""A toy model run as a user's question runs it: a prompt in steps, then single tokens."""

from __future__ import annotations

import torch

from cache.hybrid import HybridKVCache
from model.transformer import Transformer


def run(model: Transformer) -> torch.Tensor:
    """Logits of a prompt that is read in steps, and of three tokens after it."""
    ids = torch.arange(64)[None] * 31 % 97
    cache = HybridKVCache(model.config, length=64, dtype=model.dtype)
    for start in range(0, 61, 25):
        model(ids[:, start : min(start + 25, 61)], cache, logits="none")
    steps = [model(ids[:, n : n + 1], cache) for n in range(61, 64)]
    return torch.cat([step for step in steps if step is not None])
