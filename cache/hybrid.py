"""The cache of a whole model: a bounded window for each RoPE layer, a growing store for each NoPE layer.

It is the `KVCache` of model/attention.py. Knows nothing of what is computed with the keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from cache import sizes
from cache.chunked import ChunkedKVCache
from cache.offloaded import OffloadedKVCache
from cache.sizes import KVBytes
from cache.tiers import Block, empty_block
from model.backends import KVSegment
from model.config import TextConfig


class HybridKVCache:
    """Keys and values of a run of at most `length` tokens (default: max_position_embeddings) in `batch_size` rows.

    `dtype` and `device` are those the model computes in. Sealed NoPE blocks lie in host memory, which is pinned when
    `device` is an accelerator.
    """

    def __init__(self, config: TextConfig, *, length: int | None = None, batch_size: int = 1,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.offset = 0
        self.length = config.max_position_embeddings if length is None else length
        self.batch_size, self.dtype, self.device = batch_size, dtype, torch.device(device)
        self.layers: list[ChunkedKVCache | OffloadedKVCache] = [
            self._new_layer(config.uses_rope(layer)) for layer in range(config.num_hidden_layers)]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values (B, H_kv, T, D) of new tokens at `offset`; `segments` shows them at once."""
        tokens = keys.shape[2]
        expected = (self.batch_size, self.config.num_key_value_heads, tokens, self.config.head_dim)
        assert keys.shape == values.shape == expected, (keys.shape, values.shape, expected)
        assert self.offset + tokens <= self.length, f"{self.offset} + {tokens} tokens in a cache made for {self.length}"
        before = self.layers[layer - 1]
        if isinstance(before, ChunkedKVCache):
            before.finish()  # layers come in turn, so that at most one holds a whole forward's tokens
        self.layers[layer].append(self.offset, keys, values)

    def segments(self, layer: int, queries: range) -> Iterator[KVSegment]:
        """Keys and values that queries at these positions may see, oldest first; each valid until the next is asked."""
        cache = self.layers[layer]
        if isinstance(cache, ChunkedKVCache):
            return cache.segments()
        return cache.segments(len(queries) * self.batch_size)

    def advance(self, num_tokens: int) -> None:
        """Commits the new tokens of all layers: by the offset alone, so that an interruption finds all or nothing."""
        self.offset += num_tokens
        for cache in self.layers:
            cache.settle(self.offset)

    def fork(self) -> HybridKVCache:
        """An independent continuation: sealed blocks are shared, windows and open blocks copied."""
        forked = copy.copy(self)
        forked.layers = [cache.fork(self.offset) for cache in self.layers]
        return forked

    def held(self) -> KVBytes:
        """Bytes that are allocated now. The host tier of a model that computes on the CPU is its only one."""
        windows = [cache for cache in self.layers if isinstance(cache, ChunkedKVCache)]
        stores = [cache for cache in self.layers if isinstance(cache, OffloadedKVCache)]
        return KVBytes(sum(cache.nbytes for cache in windows),
                       nope_device=sum(cache.nbytes(on_host=False) for cache in stores),
                       nope_host=sum(cache.nbytes(on_host=True) for cache in stores))

    def predicted(self, tokens: int) -> int:
        """Bytes that will be allocated after `tokens` tokens, in closed form."""
        sizing = (self.dtype.itemsize, self.batch_size)
        return (sizes.window_bytes(self.config, self.length, *sizing)
                + sizes.nope_bytes(self.config, tokens, self.length, *sizing))

    def _new_layer(self, uses_rope: bool) -> ChunkedKVCache | OffloadedKVCache:
        chunk_size = self.config.attention_chunk_size
        if uses_rope:
            return ChunkedKVCache(self._new_block(min(chunk_size, self.length)), chunk_size)
        tokens = sizes.block_tokens(self.config, self.dtype.itemsize, self.batch_size)
        length, new_block = self.length, self._new_block
        return OffloadedKVCache(tokens, lambda start: new_block(min(tokens, length - start)), self.device)

    def _new_block(self, tokens: int) -> Block:
        return empty_block(self.batch_size, self.config.num_key_value_heads, tokens, self.config.head_dim,
                           self.dtype, self.device)
