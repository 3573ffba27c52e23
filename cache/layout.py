"""Shapes and bytes of the pieces that keys and values are kept in, in closed form.

A NoPE layer's store is cut twice: into blocks, which are sealed, moved and written as one, and into segments, which
attention visits one at a time. Both are cut at multiples of the attention chunk. Their sizes follow from the model and
the dtype alone, never from memory budgets, so that results do not depend on where a block lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from model.config import TextConfig

MIN_BLOCK_BYTES = 16 * 2**20
"""The least size of a NoPE layer's block, so that short attention chunks do not make thousands of files."""

MIN_SEGMENT_BYTES, MIN_SEGMENT_TOKENS = 4 * 2**20, 8192
"""The least size of a segment, unless a block is smaller: fewer, larger reads, and fewer partial results to merge."""

KV_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
"""Storage types of sealed blocks, and their bytes per element."""

QUANTIZED = ("fp8", "int8")
MAX_GROUP_TOKENS = 64
SCALE_BYTES = 4


@dataclass(frozen=True)
class StoreLayout:
    """Shapes and bytes of a run's keys and values.

    `dtype` is what the model computes in, `kv_dtype` what sealed blocks are stored in, both by name; windows and the
    open block are always in `dtype`. Lengths are in tokens; `batch_size` is B.
    """

    config: TextConfig
    length: int
    dtype: str
    kv_dtype: str
    batch_size: int
    block_tokens: int
    segment_tokens: int

    @classmethod
    def of(
        cls, config: TextConfig, *, length: int, dtype: str, kv_dtype: str = "auto", batch_size: int = 1
    ) -> StoreLayout:
        """The layout for a run of at most `length` tokens; kv_dtype "auto" means `dtype`."""
        assert dtype in KV_DTYPES and dtype not in QUANTIZED, dtype
        kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
        assert kv_dtype in KV_DTYPES, kv_dtype
        itemsize = KV_DTYPES[dtype]
        return cls(
            config,
            length,
            dtype,
            kv_dtype,
            batch_size,
            block_tokens(config, itemsize, batch_size),
            segment_tokens(config, itemsize, batch_size),
        )

    def computed_in(self, dtype: str) -> StoreLayout:
        """The same store for a model that computes in `dtype`: cut in the same places, stored in the same type."""
        return replace(self, dtype=dtype)

    def of_rank(self, config: TextConfig) -> StoreLayout:
        """One rank's part of the same store: cut in the same places, with the KV heads of the rank's configuration."""
        return replace(self, config=config)

    @property
    def is_packed(self) -> bool:
        """Whether sealed blocks are stored in another dtype, so that each segment is unpacked when it is read."""
        return self.kv_dtype != self.dtype

    @cached_property
    def group_tokens(self) -> int:
        """Consecutive tokens that share the scales of a quantized type: the largest divisor of a segment up to 64."""
        return max(n for n in range(1, MAX_GROUP_TOKENS + 1) if self.segment_tokens % n == 0)

    @property
    def segments_per_block(self) -> int:
        return self.block_tokens // self.segment_tokens

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer, in `dtype`."""
        return layer_bytes_per_token(self.config, KV_DTYPES[self.dtype], self.batch_size)

    @property
    def segment_bytes(self) -> int:
        """One layer's segment in `dtype`."""
        return self.segment_tokens * self.token_bytes

    @property
    def scale_bytes(self) -> int:
        """Scales of one layer's sealed segment: for keys one per channel and token group, for values one per token."""
        if self.kv_dtype not in QUANTIZED:
            return 0
        groups = self.segment_tokens // self.group_tokens
        scales = groups * self.config.head_dim + self.segment_tokens  # of one head
        return self.batch_size * self.config.num_key_value_heads * scales * SCALE_BYTES

    @property
    def sealed_segment_bytes(self) -> int:
        """One layer's segment as stored once sealed."""
        elements = layer_bytes_per_token(self.config, 1, self.batch_size) * self.segment_tokens
        return elements * KV_DTYPES[self.kv_dtype] + self.scale_bytes

    @property
    def row_bytes(self) -> int:
        """One sealed block of every NoPE layer."""
        return self.config.num_nope_layers * self.segments_per_block * self.sealed_segment_bytes

    @property
    def window_bytes(self) -> int:
        """The RoPE layers' windows: at most one attention chunk each."""
        window = min(self.config.attention_chunk_size, self.length)
        return self.config.num_rope_layers * window * self.token_bytes

    def open_bytes(self, tokens: int) -> int:
        """The NoPE layers' segments that hold `tokens` tokens behind the last sealed block, unused parts included."""
        segments = -(-tokens // self.segment_tokens)
        return self.config.num_nope_layers * segments * self.segment_bytes

    def sealed_rows(self, tokens: int) -> int:
        return tokens // self.block_tokens


def layer_bytes_per_token(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """Keys and values of one token in one layer; `itemsize` in bytes per element."""
    return 2 * batch_size * config.num_key_value_heads * config.head_dim * itemsize


def bytes_per_token(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """What each further token adds permanently: keys and values of the NoPE layers."""
    return config.num_nope_layers * layer_bytes_per_token(config, itemsize, batch_size)


def block_tokens(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """Tokens in a NoPE block: the least multiple of the attention chunk that fills MIN_BLOCK_BYTES."""
    chunk_bytes = config.attention_chunk_size * layer_bytes_per_token(config, itemsize, batch_size)
    return config.attention_chunk_size * -(-MIN_BLOCK_BYTES // chunk_bytes)


def segment_tokens(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """Tokens in a segment: the smallest number of attention chunks that divides a block and is large enough."""
    block = block_tokens(config, itemsize, batch_size)
    least = max(MIN_SEGMENT_TOKENS, math.ceil(MIN_SEGMENT_BYTES / layer_bytes_per_token(config, itemsize, batch_size)))
    chunks = block // config.attention_chunk_size
    shares = (n * config.attention_chunk_size for n in range(1, chunks + 1) if chunks % n == 0)
    return next((tokens for tokens in shares if tokens >= least), block)


def unbounded_bytes(config: TextConfig, tokens: int, itemsize: int, batch_size: int = 1) -> int:
    """Bytes of a cache that keeps all keys and values of every layer."""
    return tokens * config.num_hidden_layers * layer_bytes_per_token(config, itemsize, batch_size)
