"""The cache of one of several context ranks: the whole sequence to its callers, the rank's own chunks within.

A rank's tokens are numbered in their order (see model/context_division.py), so that `own` is an ordinary cache: one
window for each RoPE layer, and the NoPE blocks of the rank's chunks, in tiers of their own. Rows of a saved context are
of the whole sequence: `ContextRows` gathers them from the ranks, and `cache.dealt` reads them as own blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from cache.blocks import Block, joined
from cache.dealt import DealtRows
from cache.disk import UnitFile, Units
from cache.fork import ForkedKVCache
from cache.hybrid import HybridKVCache
from cache.residency import KVBytes
from cache.tiers import RowStore
from model.context_division import ContextRank


class ContextRows(Protocol):
    """Where rows of the whole sequence are saved. Every rank saves a row at the same time."""

    def save(self, row: int, cache: ContextKVCache) -> UnitFile:
        """Writes a row with what each rank's cache has of it; returns the file, which reads as this rank's heads."""
        ...


class ContextKVCache:
    """`length` tokens at most, of which `own` holds those of this rank: `ContextRank.own_length`."""

    def __init__(self, own: HybridKVCache, rank: ContextRank, length: int, saved: ContextRows | None = None) -> None:
        """Every row of the whole sequence is saved in `saved` as soon as it is complete."""
        assert own.length >= rank.own_length(length, own.config.attention_chunk_size), "own part is too small"
        self.config, self.layout, self.batch_size, self.dtype = own.config, own.layout, own.batch_size, own.dtype
        self.rank, self.length = rank, length
        self.offset = 0
        self._own, self._saved = own, saved
        self._files: list[UnitFile] = []  # of whole rows
        if saved is not None:
            own.rows = _SavedRows(DealtRows(self._files, rank, own.layout))

    @property
    def own(self) -> HybridKVCache:
        """This rank's tokens of those that are committed."""
        behind = self.own_tokens(self.offset) - self._own.offset
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

    def own_tokens(self, position: int) -> int:
        """How many of the tokens before `position` are this rank's."""
        return self.rank.tokens_before(position, self.config.attention_chunk_size)

    def rewind(self, offset: int) -> None:
        """Takes back the tokens from `offset` on, all of which were appended within `room`."""
        size, own = self.config.attention_chunk_size, self.own
        assert offset <= self.offset and offset // size == self.offset // size, (offset, self.offset)
        self.offset = offset
        if own.offset != self.own_tokens(offset):
            own.rewind(self.own_tokens(offset))

    def advance(self, num_tokens: int) -> None:
        """Commits the new tokens of all ranks by changing the offset alone; complete rows are saved, and the own tokens
        then move to their tiers. Raises what saving a row raises."""
        self.offset += num_tokens
        assert self.offset <= self.length, (self.offset, self.length)
        if self._saved is not None:
            for row in range(len(self._files), self.offset // self.layout.block_tokens):
                self._files.append(self._saved.save(row, self))
        _ = self.own

    def stop_saving(self, rows: RowStore | None) -> None:
        """What is read from now on is in no context; what memory does not hold goes to `rows`."""
        self.own.rows, self._saved = rows, None

    def restore(
        self,
        offset: int,
        files: Sequence[UnitFile],
        *,
        tail: Mapping[int, Block] | None = None,
        partial: UnitFile | None = None,
    ) -> None:
        """As `HybridKVCache.restore`, with the files of the whole sequence, of which this rank takes its own tokens.

        Raises DiskError.
        """
        assert self.offset == 0 and len(files) == offset // self.layout.block_tokens, (self.offset, len(files), offset)
        self._files += files
        block, start = self.layout.block_tokens, len(files) * self.layout.block_tokens
        rows = DealtRows(self._files, self.rank, self.layout)
        own_offset = self.own_tokens(offset)
        sealed = min(own_offset, rows.own_tokens) // block
        behind = DealtRows([*files, partial] if partial is not None else files, self.rank, self.layout)
        rest: dict[int, Block] = {}
        for layer in range(self.config.num_hidden_layers):
            if self.config.uses_rope(layer):
                if own_offset % self.config.attention_chunk_size:  # the current chunk is this rank's
                    assert tail is not None, "no windows"
                    rest[layer] = tail[layer]
                continue
            stop = own_offset if partial is not None else rows.own_tokens
            parts = list(behind.parts(layer, range(sealed * block, stop)))
            for positions in self.rank.positions(range(stop, own_offset), self.config.attention_chunk_size):
                assert tail is not None, "no open block"
                parts.append(tail[layer].within(slice(positions.start - start, positions.stop - start)))
            if parts:
                rest[layer] = joined(parts)
        self._own.restore(own_offset, [rows.file(row) for row in range(sealed)], tail=rest)
        self.offset = offset

    def copied(self, layer: int, positions: range) -> Block:
        """Those keys and values at these positions that this rank has: see `HybridKVCache.copied`."""
        return self._own.copied(layer, range(self.own_tokens(positions.start), self.own_tokens(positions.stop)))

    def pin(self, tokens: int, *, all_on_disk: bool = False) -> int:
        """As `HybridKVCache.pin`, for this rank's part of so many tokens."""
        return self._own.pin(self.own_tokens(tokens), all_on_disk=all_on_disk)

    def held(self) -> KVBytes:
        """Bytes that this rank holds now."""
        return self.own.held()


class _SavedRows:
    """A `RowStore` for own rows, whose tokens are saved with rows of the whole sequence, soon if not yet."""

    is_durable = True

    def __init__(self, rows: DealtRows) -> None:
        self._rows = rows

    def write(self, row: int, units: Units) -> UnitFile | None:
        is_there = (row + 1) * self._rows.layout.block_tokens <= self._rows.own_tokens
        return self._rows.file(row) if is_there else None


class ForkedContextCache:
    """A continuation of a cache of context ranks: see `cache.fork.ForkedKVCache`, which holds the own tokens of it."""

    def __init__(self, base: ContextKVCache, room: int) -> None:
        self.config, self.layout, self.length = base.config, base.layout, base.length
        self.rank, self.batch_size, self.dtype = base.rank, base.batch_size, base.dtype
        self.offset = self.start = base.offset
        self._end = min(base.length, base.offset + room)
        self.own_start = base.own_tokens(self.start)
        self.own = ForkedKVCache(base.own, base.own_tokens(self._end) - self.own_start)

    @property
    def segment_tokens(self) -> int:
        return self.layout.segment_tokens

    @property
    def capacity(self) -> int:
        """Tokens behind the shared ones that it was made for."""
        return self._end - self.start

    @property
    def room(self) -> int:
        """How many tokens can be appended and taken back: less than what the attention chunk has left."""
        size = self.config.attention_chunk_size
        return min(size - self.offset % size - 1, self._end - self.offset)

    def own_tokens(self, position: int) -> int:
        """How many of the tokens before `position` are this rank's."""
        return self.rank.tokens_before(position, self.config.attention_chunk_size)

    def rewind(self, offset: int) -> None:
        """Takes back the tokens from `offset` on, all of which were appended within `room`."""
        size = self.config.attention_chunk_size
        assert self.start <= offset <= self.offset and offset // size == self.offset // size, (offset, self.offset)
        self.offset = offset
        self.own.rewind(self.own_tokens(offset))

    def advance(self, num_tokens: int) -> None:
        """Commits the new tokens of all ranks."""
        self.offset += num_tokens
        assert self.offset <= self._end, (self.offset, self._end)
        self.own.advance(self.own_tokens(self.offset) - self.own.offset)


Continuation = ForkedKVCache | ForkedContextCache


def continuation(base: HybridKVCache | ContextKVCache, room: int) -> Continuation:
    """Room for so many tokens behind those of `base`, which must not change meanwhile."""
    return ForkedContextCache(base, room) if isinstance(base, ContextKVCache) else ForkedKVCache(base, room)
