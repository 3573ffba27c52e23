"""The cache of one NoPE layer: all keys and values, in segments of fixed size that are never copied as it grows.

The last segments are open and lie where the model computes. A block of them that is full of committed tokens is sealed:
immutable, shared by forks, free to move between tiers. The committed offset, which the caller passes, is the only
truth.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cache.blocks import Block, empty_block
from cache.residency import Residency
from cache.sealed import SealedBlock
from cache.tiers import Tiers
from model.gpu.support import LayerPages
from model.kernels.attend import KVSegment


class OffloadedKVCache:
    """Block i begins at position i * block_tokens, segment i at i * segment_tokens."""

    def __init__(self, layer: int, tiers: Tiers, length: int) -> None:
        self.layer, self.tiers, self.length = layer, tiers, length
        self.sealed: list[SealedBlock] = []
        self.open: dict[int, Block] = {}  # by segment number
        self._stop = 0  # one past the last token, new ones included

    def append(self, offset: int, keys: Tensor, values: Tensor) -> None:
        """Appends tokens (B, H_kv, T, D) at `offset` to the open segment and to as many new ones as they need."""
        self.settle(offset)
        size = self.tiers.layout.segment_tokens
        stop = offset + keys.shape[2]
        assert stop <= self.length, (stop, self.length)
        position = offset
        while position < stop:
            number, used = divmod(position, size)
            segment = self.segment(number)
            count = min(stop - position, size - used)
            source = slice(position - offset, position - offset + count)
            segment.keys[:, :, used : used + count] = keys[:, :, source]
            segment.values[:, :, used : used + count] = values[:, :, source]
            position += count
        self._stop = stop

    def segments(self, num_queries: int, residency: Residency, within: range | None = None) -> Iterator[KVSegment]:
        """Keys and values, oldest first, as they are stored.

        All of them, or those `within` a range that begins and ends at blocks, or at the last token.
        """
        layout = self.tiers.layout
        size, per_block = layout.segment_tokens, layout.block_tokens
        within = within or range(self._stop)
        assert within.start % per_block == 0, within
        start, sealed = within.start, range(within.start // per_block, min(len(self.sealed), within.stop // per_block))
        yield from self.tiers.stream(self.sealed, residency, num_queries, sealed)
        start += len(sealed) * per_block
        while start < within.stop:  # any segment past it was left by a forward that did not finish
            yield KVSegment(*self.open[start // size].first(within.stop - start), start, stays=True)
            start += size

    def reserve(self, offset: int, stop: int) -> None:
        """Makes the open segments of the tokens from `offset`, the committed ones, to before `stop`."""
        self.settle(offset)
        size = self.tiers.layout.segment_tokens
        for number in range(len(self.sealed) * self.tiers.layout.segments_per_block, -(-stop // size)):
            self.segment(number)
        self._stop = stop

    def pages(self) -> LayerPages | None:
        """All segments, if they are where the model computes, in its dtype."""
        found = []
        for block in self.sealed:
            segments = self.tiers.where_computed(block)
            if segments is None:
                return None
            found += [(segment.keys, segment.values) for segment in segments]
        found += [(self.open[number].keys, self.open[number].values) for number in sorted(self.open)]
        return LayerPages(self.tiers.layout.segment_tokens, found)

    def settle(self, offset: int) -> None:
        """Seals the blocks that are full of committed tokens."""
        per_block = self.tiers.layout.segments_per_block
        while (len(self.sealed) + 1) * self.tiers.layout.block_tokens <= offset:
            first = len(self.sealed) * per_block
            self.sealed.append(self.tiers.seal(self.layer, [self.open[first + n] for n in range(per_block)]))
        for number in [number for number in self.open if number < len(self.sealed) * per_block]:
            del self.open[number]

    def restore(self, offset: int, sealed: list[SealedBlock]) -> None:
        """Starts with `offset` tokens: these sealed blocks, and open segments that the caller fills afterwards."""
        assert not self.sealed and not self.open, "not empty"
        self.sealed, self._stop = sealed, offset

    def fork(self, offset: int) -> OffloadedKVCache:
        """A copy that has committed `offset` tokens: shares the sealed blocks and copies the open segments."""
        self.settle(offset)
        forked = OffloadedKVCache(self.layer, self.tiers, self.length)
        forked.sealed = list(self.sealed)
        size, start = self.tiers.layout.segment_tokens, len(self.sealed) * self.tiers.layout.block_tokens
        for position in range(start, offset, size):
            number, used = position // size, min(size, offset - position)
            forked.segment(number).first(used).copy_from(self.open[number].first(used))
        forked._stop = offset
        return forked

    def parts(self, positions: range) -> Iterator[Block]:
        """Keys and values at these positions in the compute dtype, committed or not, segment by segment."""
        size, per_block = self.tiers.layout.segment_tokens, self.tiers.layout.segments_per_block
        for number in range(positions.start // size, -(-positions.stop // size)):
            row, place = divmod(number, per_block)
            here = self.tiers.load(self.sealed[row], place) if row < len(self.sealed) else self.open[number]
            yield here.within(slice(max(0, positions.start - number * size), min(size, positions.stop - number * size)))

    def nbytes(self, *, on_host: bool) -> int:
        """Bytes in host memory, or on an accelerator."""
        opened = 0 if on_host == self.tiers.is_accelerated else sum(block.nbytes for block in self.open.values())
        return opened + sum(block.nbytes(on_host=on_host) for block in self.sealed)

    def segment(self, number: int) -> Block:
        """The open segment of this number, created on first use; no longer than the rest of the run."""
        if number not in self.open:
            size = self.tiers.layout.segment_tokens
            self.open[number] = empty_block(
                self.tiers.layout, min(size, self.length - number * size), self.tiers.device
            )
        return self.open[number]
