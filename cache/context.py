"""The cache of one of several context ranks: the whole sequence to its callers, the rank's own chunks within.

A rank's tokens are numbered in their order (see model/context_division.py), so that `own` is an ordinary cache: one
window for each RoPE layer, and the NoPE blocks of the rank's chunks, in tiers of their own.
"""

from __future__ import annotations

from cache.hybrid import HybridKVCache
from cache.residency import KVBytes
from model.context_division import ContextRank


class ContextKVCache:
    """`length` tokens at most, of which `own` holds those of this rank: `ContextRank.own_length`."""

    def __init__(self, own: HybridKVCache, rank: ContextRank, length: int) -> None:
        assert own.length >= rank.own_length(length, own.config.attention_chunk_size), "own part is too small"
        self.config, self.layout, self.batch_size, self.dtype = own.config, own.layout, own.batch_size, own.dtype
        self.rank, self.length = rank, length
        self.offset = 0
        self._own = own

    @property
    def own(self) -> HybridKVCache:
        """This rank's tokens of those that are committed."""
        behind = self._own_offset - self._own.offset
        if behind:
            self._own.advance(behind)
        return self._own

    @property
    def segment_tokens(self) -> int:
        return self.layout.segment_tokens

    def reserve(self, tokens: int) -> None:
        """No pages for recorded steps."""

    @property
    def room(self) -> int:
        """How many tokens can be appended and taken back: less than what the attention chunk has left."""
        size = self.config.attention_chunk_size
        return min(size - self.offset % size - 1, self.length - self.offset)

    def rewind(self, offset: int) -> None:
        """Takes back the tokens from `offset` on, all of which were appended within `room`."""
        size, own = self.config.attention_chunk_size, self.own
        assert offset <= self.offset and offset // size == self.offset // size, (offset, self.offset)
        self.offset = offset
        if own.offset != self._own_offset:
            own.rewind(self._own_offset)

    def advance(self, num_tokens: int) -> None:
        """Commits the new tokens of all ranks by changing the offset alone; the own ones then move to their tiers."""
        self.offset += num_tokens
        assert self.offset <= self.length, (self.offset, self.length)
        _ = self.own

    def held(self) -> KVBytes:
        """Bytes that this rank holds now."""
        return self.own.held()

    @property
    def _own_offset(self) -> int:
        return self.rank.tokens_before(self.offset, self.config.attention_chunk_size)
