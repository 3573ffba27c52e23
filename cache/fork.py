"""A continuation of a cache that others share: holds its own tokens alone, and sees those before them where they are.

The cache of a question among many about the same documents. What it adds stays in memory in the compute dtype, and
nothing is sealed, for questions and answers are short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from cache.blocks import Block, empty_block
from cache.chunked import ChunkedKVCache
from cache.hybrid import HybridKVCache
from model.kernels.attend import KVSegment

PIECE_TOKENS = 512
"""Tokens for which memory is taken at a time."""


class ForkedKVCache:
    """At most `room` tokens behind those of `base`, which must not change while this is in use."""

    def __init__(self, base: HybridKVCache, room: int) -> None:
        self.config, self.layout, self.length = base.config, base.layout, base.length
        self.batch_size, self.dtype = base.batch_size, base.dtype
        self.offset = self._start = self._stop = base.offset
        self._base, self._end = base, min(base.length, base.offset + room)
        for cache in base.layers:
            cache.settle(base.offset)
        self._pieces: list[list[Block]] = [[] for _ in base.layers]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values (B, H_kv, T, D) of new tokens at `offset`; `segments` yields them at once."""
        tokens = keys.shape[2]
        expected = (self.batch_size, self.config.num_key_value_heads, tokens, self.config.head_dim)
        assert keys.shape == values.shape == expected, (keys.shape, values.shape, expected)
        stop = self._stop = self.offset + tokens
        assert stop <= self._end, f"{stop - self._start} tokens in a fork with room for {self._end - self._start}"
        position = self.offset
        while position < stop:
            number, used = divmod(position - self._start, PIECE_TOKENS)
            piece = self._piece(layer, number)
            count = min(stop - position, PIECE_TOKENS - used)
            source = slice(position - self.offset, position - self.offset + count)
            piece.keys[:, :, used : used + count] = keys[:, :, source]
            piece.values[:, :, used : used + count] = values[:, :, source]
            position += count

    def segments(self, layer: int, queries: range, within: range | None = None) -> Iterator[KVSegment]:
        """Keys and values that queries at these positions may see, oldest first; each is valid until the next one.

        Of a NoPE layer those `within` these positions, which begin or end at `shared_tokens`.
        """
        assert self._base.offset == self._start, "the cache that is shared has changed"
        shared, first = self._base.layers[layer], 0
        if isinstance(shared, ChunkedKVCache):
            first, within = self.offset - self.offset % shared.chunk_size, None
            if first < self._start:
                yield KVSegment(*shared.window.first(self._start - first), first, stays=True)
        elif self._start and (within is None or within.start < self._start):
            yield from self._base.segments(layer, queries, range(self._start))
        if within is None or within.stop > self._start:
            yield from self._own_segments(layer, first)

    def shared_tokens(self, others: Sequence[ForkedKVCache]) -> int:
        """How many first tokens of the NoPE layers are those of the same cache."""
        return self._start if all(other._base is self._base for other in others) else 0

    @property
    def capacity(self) -> int:
        """Tokens of its own that it was made for."""
        return self._end - self._start

    def reserve(self, tokens: int) -> None:
        """No pages for recorded steps."""

    @property
    def room(self) -> int:
        """How many tokens can be appended and taken back: less than what the attention chunk has left."""
        size = self.config.attention_chunk_size
        return min(size - self.offset % size - 1, self._end - self.offset)

    def rewind(self, offset: int) -> None:
        """Takes back the tokens from `offset` on, all of which were appended within `room`."""
        size = self.config.attention_chunk_size
        assert self._start <= offset <= self.offset and offset // size == self.offset // size, (offset, self.offset)
        self.offset = offset

    def advance(self, num_tokens: int) -> None:
        """Commits the new tokens of all layers."""
        self.offset += num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of its own: at most `cache.residency.fork_bytes`."""
        return sum(piece.nbytes for pieces in self._pieces for piece in pieces)

    def _piece(self, layer: int, number: int) -> Block:
        pieces = self._pieces[layer]
        if number == len(pieces):
            tokens = min(PIECE_TOKENS, self._end - self._start - number * PIECE_TOKENS)
            pieces.append(empty_block(self.layout, tokens, self._base.devices[layer]))
        return pieces[number]

    def _own_segments(self, layer: int, first: int) -> Iterator[KVSegment]:
        """Of the tokens behind the shared ones those from position `first` on."""
        for number, piece in enumerate(self._pieces[layer]):
            start = self._start + number * PIECE_TOKENS
            skipped, stop = max(0, first - start), min(PIECE_TOKENS, self._stop - start)
            if skipped < stop:
                keys, values = (x[:, :, skipped:stop] for x in piece)
                yield KVSegment(keys, values, start + skipped, stays=True)
