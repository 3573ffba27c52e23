"""Closed-form bytes of keys and values by layer kind. Imports no torch, so that plans are quick.

What is computed here is what `HybridKVCache` holds, to the byte; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import TextConfig

MIN_BLOCK_BYTES = 16 * 2**20
"""A NoPE layer's block is not smaller, so that short attention chunks do not make thousands of blocks."""


@dataclass(frozen=True)
class KVBytes:
    """Bytes of keys and values: RoPE windows, and NoPE blocks by the tier they are held in."""

    rope_windows: int
    nope_device: int
    nope_host: int

    @property
    def nope(self) -> int:
        return self.nope_device + self.nope_host

    @property
    def total(self) -> int:
        return self.rope_windows + self.nope


def layer_bytes_per_token(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """Keys and values of one token in one layer; `itemsize` in bytes an element."""
    return 2 * batch_size * config.num_key_value_heads * config.head_dim * itemsize


def bytes_per_token(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """What each further token adds for good: keys and values of the NoPE layers."""
    return config.num_nope_layers * layer_bytes_per_token(config, itemsize, batch_size)


def block_tokens(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """Tokens in a NoPE block: the least multiple of the attention chunk that fills MIN_BLOCK_BYTES."""
    chunk_bytes = config.attention_chunk_size * layer_bytes_per_token(config, itemsize, batch_size)
    return config.attention_chunk_size * -(-MIN_BLOCK_BYTES // chunk_bytes)


def window_bytes(config: TextConfig, length: int, itemsize: int, batch_size: int = 1) -> int:
    """The RoPE layers' windows in a run of at most `length` tokens: never more than one attention chunk each."""
    window = min(config.attention_chunk_size, length)
    return config.num_rope_layers * window * layer_bytes_per_token(config, itemsize, batch_size)


def nope_bytes(config: TextConfig, tokens: int, length: int, itemsize: int, batch_size: int = 1) -> int:
    """The NoPE layers' blocks after `tokens` of a run of at most `length`, the open block's unused part included."""
    block = block_tokens(config, itemsize, batch_size)
    allocated = min(-(-tokens // block) * block, length)
    return allocated * bytes_per_token(config, itemsize, batch_size)


def unbounded_bytes(config: TextConfig, tokens: int, itemsize: int, batch_size: int = 1) -> int:
    """What a cache that keeps every layer's keys and values would take."""
    return tokens * config.num_hidden_layers * layer_bytes_per_token(config, itemsize, batch_size)
