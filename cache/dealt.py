"""Files that hold rows of the whole sequence, read as the blocks of one context rank, which owns some of its chunks.

A file is the same whatever the number of ranks, so what some wrote others read. Where a rank's segment is one of the
file's, as in the published models, it is read as it is stored; elsewhere it is put together from parts of several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cache.blocks import Block, empty_block, joined
from cache.disk import UnitFile
from cache.layout import StoreLayout
from cache.packing import pack, packed_from_bytes, unpack
from cache.tiers import unit_name
from model.context_division import ContextRank
from model.weights.read_ahead import as_bytes


class DealtRows:
    """Rows of the whole sequence with this rank's KV heads, a file each; there may be more of them later."""

    def __init__(self, files: Sequence[UnitFile], rank: ContextRank, layout: StoreLayout) -> None:
        """`layout` is the rank's."""
        self.files, self.layout, self._rank = files, layout, rank

    @property
    def own_tokens(self) -> int:
        """How many of this rank's tokens are in these files."""
        tokens = len(self.files) * self.layout.block_tokens
        return self._rank.tokens_before(tokens, self.layout.config.attention_chunk_size)

    def file(self, row: int) -> DealtFile:
        """The rank's own row, all of whose tokens are there."""
        assert (row + 1) * self.layout.block_tokens <= self.own_tokens, (row, self.own_tokens)
        return DealtFile(self, row)

    def read_segment(self, layer: int, own: range, into: memoryview) -> None:
        """A segment of the rank's own numbering as it is stored. Raises DiskError."""
        size, per_block = self.layout.segment_tokens, self.layout.segments_per_block
        first = next(self._rank.positions(own, self.layout.config.attention_chunk_size))
        number, rest = divmod(first.start, size)
        if rest == 0 and len(first) == size:
            self.files[number // per_block].read(unit_name(layer, number % per_block), into)
            return
        found = pack(joined(list(self.parts(layer, own))), self.layout)
        target = packed_from_bytes(torch.frombuffer(into, dtype=torch.uint8), self.layout)
        for (_, place), (_, tensor) in zip(target.tensors, found.tensors, strict=True):
            place.copy_(tensor)

    def parts(self, layer: int, own: range) -> Iterator[Block]:
        """Keys and values of tokens in the rank's own numbering, in the compute dtype. Raises DiskError."""
        size = self.layout.segment_tokens
        held: tuple[int, Block] | None = None
        for positions in self._rank.positions(own, self.layout.config.attention_chunk_size):
            number = positions.start // size  # segments end where attention chunks do
            if held is None or held[0] != number:
                held = number, self._segment(layer, number)
            yield held[1].within(slice(positions.start - number * size, positions.stop - number * size))

    def _segment(self, layer: int, number: int) -> Block:
        layout = self.layout
        buffer = torch.empty(layout.sealed_segment_bytes, dtype=torch.uint8)
        row, place = divmod(number, layout.segments_per_block)
        self.files[row].read(unit_name(layer, place), as_bytes(buffer))
        into = empty_block(layout, layout.segment_tokens, torch.device("cpu"))
        return Block(*unpack(packed_from_bytes(buffer, layout), layout, into))


class DealtFile(UnitFile):
    """One row of a rank's own blocks."""

    def __init__(self, rows: DealtRows, row: int) -> None:
        super().__init__(rows.files[0].source, header_sha256=None)
        self._rows, self._row = rows, row

    def read(self, name: str, into: memoryview) -> None:
        """Fills `into`, which is as long as a sealed segment. Raises DiskError."""
        layer, number = (int(digits) for digits in name.split("."))
        layout = self._rows.layout
        start = self._row * layout.block_tokens + number * layout.segment_tokens
        self._rows.read_segment(layer, range(start, start + layout.segment_tokens), into)
