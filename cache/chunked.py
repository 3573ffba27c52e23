"""The cache of one RoPE layer: keys and values of the current attention chunk, and nothing older.

At a multiple of the attention chunk the window is empty. Knows nothing of other layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cache.tiers import Block
from model.backends import KVSegment


class ChunkedKVCache:
    """`window` has room for one attention chunk, or for the whole run if that is shorter."""

    def __init__(self, window: Block, chunk_size: int) -> None:
        self.window = window
        self.chunk_size = chunk_size
        self._new: Block | None = None  # tokens of the current forward, when they do not fit into the window
        self._first = self._stop = 0  # positions of the first kept token and behind the last

    def append(self, offset: int, keys: Tensor, values: Tensor) -> None:
        """Tokens (B, H_kv, T, D) at `offset`. Within the current chunk they go straight into the window."""
        used = offset % self.chunk_size
        tokens = keys.shape[2]
        self._first, self._stop = offset - used, offset + tokens
        if used + tokens <= self.chunk_size:
            self.window.keys[:, :, used:used + tokens] = keys
            self.window.values[:, :, used:used + tokens] = values
            self._new = None
        else:
            self._new = Block(keys, values)

    def segments(self) -> Iterator[KVSegment]:
        if self._new is None:
            yield KVSegment(*self.window.first(self._stop - self._first), self._first)
            return
        offset = self._stop - self._new.keys.shape[2]
        if offset > self._first:
            yield KVSegment(*self.window.first(offset - self._first), self._first)
        yield KVSegment(*self._new, offset)

    def commit(self) -> None:
        """Keeps of the new tokens those of the chunk that the next one falls into."""
        rest = self._stop % self.chunk_size
        if self._new is not None and rest:
            self.window.keys[:, :, :rest] = self._new.keys[:, :, -rest:]
            self.window.values[:, :, :rest] = self._new.values[:, :, -rest:]
        self._new = None
        self._first = self._stop - rest

    def fork(self) -> ChunkedKVCache:
        forked = ChunkedKVCache(Block(self.window.keys.clone(), self.window.values.clone()), self.chunk_size)
        forked._first, forked._stop = self._first, self._stop
        return forked

    @property
    def nbytes(self) -> int:
        return self.window.nbytes

    @property
    def device(self) -> torch.device:
        return self.window.keys.device
