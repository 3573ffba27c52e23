"""Toy caches: a configuration, random keys and values, and a naive cache that keeps everything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache.fork import ForkedKVCache
from cache.hybrid import HybridKVCache
from model.config import TextConfig
from support.cached_paths import small_layout

CHUNK, HEADS, HEAD_DIM = 7, 2, 10
CONFIG = TextConfig.from_dict(
    {
        "model_type": "llama4_text",
        "vocab_size": 97,
        "hidden_size": 42,
        "intermediate_size": 22,
        "intermediate_size_mlp": 34,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_local_experts": 5,
        "attention_chunk_size": CHUNK,
        "max_position_embeddings": 256,
        "no_rope_layers": [1, 0, 1, 1, 0],
    }
)
LAYERS = range(5)


def make(
    *,
    block_chunks: int = 2,
    segment_chunks: int = 1,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    kv_dtype: str = "auto",
    length: int = CONFIG.max_position_embeddings,
    **where: Any,
) -> HybridKVCache:
    """A cache with NoPE blocks of `block_chunks` attention chunks, in segments of `segment_chunks`."""
    layout = small_layout(
        CONFIG,
        length=length,
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=kv_dtype,
        batch_size=batch_size,
        block_chunks=block_chunks,
        segment_chunks=segment_chunks,
    )
    assert layout.block_tokens == block_chunks * CHUNK and layout.segment_tokens == segment_chunks * CHUNK
    return HybridKVCache(CONFIG, batch_size=batch_size, dtype=dtype, length=length, layout=layout, **where)


@dataclass
class Naive:
    """The expected content of a cache: all keys and values of all layers, (B, H_kv, S, D) each."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, cache: HybridKVCache) -> Naive:
        empty = torch.empty(cache.batch_size, HEADS, 0, HEAD_DIM, dtype=cache.dtype)
        return cls([empty] * len(LAYERS), [empty] * len(LAYERS))

    def fork(self) -> Naive:
        return Naive(list(self.keys), list(self.values))


def random_keys_values(cache: HybridKVCache | ForkedKVCache, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values with the strides that the model gives them: (B, T, H_kv, D), transposed."""
    shape = (cache.batch_size, tokens, HEADS, HEAD_DIM)
    return torch.randn(shape).to(cache.dtype).transpose(1, 2), torch.randn(shape).to(cache.dtype).transpose(1, 2)


def step(cache: HybridKVCache | ForkedKVCache, naive: Naive, tokens: int, *, commit: bool = True) -> None:
    """One forward of `tokens`: appends to every layer, compares what each then shows, and commits."""
    offset = cache.offset
    for layer in LAYERS:
        keys, values = random_keys_values(cache, tokens)
        cache.append(layer, keys, values)
        all_keys = torch.cat([naive.keys[layer], keys], 2)
        all_values = torch.cat([naive.values[layer], values], 2)
        first = offset // CHUNK * CHUNK if CONFIG.uses_rope(layer) else 0
        for queries in (range(offset, offset + tokens), range(offset + tokens - 1, offset + tokens)):
            position = first
            for segment in cache.segments(layer, queries):
                assert segment.start == position
                here = segment.positions
                assert len(here) > 0 and segment.keys.dtype == segment.values.dtype == cache.dtype
                assert torch.equal(segment.keys, all_keys[:, :, here.start : here.stop])
                assert torch.equal(segment.values, all_values[:, :, here.start : here.stop])
                position = here.stop
            assert position == offset + tokens  # the new tokens come last, with no gap
        if commit:
            naive.keys[layer], naive.values[layer] = all_keys, all_values
    if commit:
        cache.advance(tokens)
        assert cache.offset == offset + tokens


def storage_bytes(value: object, seen: dict[int, int] | None = None) -> int:
    """Bytes of all tensor storages reachable from an object of the cache, each counted once."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, list | tuple):
        for item in value:
            storage_bytes(item, seen)
    elif isinstance(value, dict):
        storage_bytes(list(value.values()), seen)
    elif type(value).__module__.startswith("cache."):
        storage_bytes(vars(value), seen)
    return sum(seen.values())


def pieces(seed: int, total: int, largest: int = 3 * CHUNK) -> Iterator[int]:
    source = random.Random(seed)
    while total:
        tokens = min(total, source.choice((1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, source.randint(1, largest))))
        total -= tokens
        yield tokens
