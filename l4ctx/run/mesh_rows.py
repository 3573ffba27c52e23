"""A saved context that context ranks fill: the first one writes the rows of the whole sequence.

So the folder is the same whatever the number of ranks, with one writer and one journal. See `l4ctx.run.rank_rows` for
ranks that all have the same tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cache.blocks import Block
from cache.context import ContextKVCache
from cache.disk import UnitFile, Units
from cache.heads import HeadsFile
from cache.layout import StoreLayout
from cache.packing import pack
from cache.tiers import RowStore, unit_name
from l4ctx.run.channel import Channel
from l4ctx.run.rank_rows import heads_of, tensor_rank
from model.config import TextConfig
from model.context_division import ContextRank
from model.division import TensorRank, kv_heads


class MeshRows:
    """A `cache.context.ContextRows` of tensor and context ranks. All save a row at the same token."""

    def __init__(
        self,
        channel: Channel,
        config: TextConfig,
        layout: StoreLayout,
        context_ranks: int,
        store: RowStore | None = None,
    ) -> None:
        """`config` is the whole model's, `layout` this rank's; the first rank has the `store`."""
        rank = channel.exchange.rank
        self._channel, self._config, self._layout, self._store = channel, config, layout, store
        self._context, self._tensor = context_ranks, rank.count // context_ranks
        self._heads = heads_of(config, tensor_rank(rank, context_ranks))

    def save(self, row: int, cache: ContextKVCache) -> UnitFile:
        """Raises what the store raises."""
        whole, size = self._layout.of_rank(self._config), self._layout.segment_tokens
        units: dict[str, list[tuple[str, Tensor]]] = {}
        for layer in range(self._config.num_hidden_layers):
            if self._config.uses_rope(layer):
                continue
            for number in range(self._layout.segments_per_block):
                start = row * self._layout.block_tokens + number * size
                block = self._of_all(layer, range(start, start + size), cache)
                if block is not None:
                    units[unit_name(layer, number)] = pack(block, whole).tensors
        source, digest = self._written(row, units)
        return HeadsFile(source, header_sha256=digest, layout=self._layout, heads=self._heads)

    def tail(self, cache: ContextKVCache) -> dict[int, Block]:
        """On the first rank, the tail of a cache of the whole sequence with all KV heads."""
        tails, stop = {}, cache.offset
        for layer in range(self._config.num_hidden_layers):
            is_window = self._config.uses_rope(layer)
            start = stop - stop % (self._config.attention_chunk_size if is_window else self._layout.block_tokens)
            if is_window or start < stop:
                block = self._of_all(layer, range(start, stop), cache)
                if block is not None:
                    tails[layer] = block
        return tails

    def _written(self, row: int, units: Units) -> tuple[Path, str | None]:
        """The row's file and its digest, which the first rank tells the others."""
        if self._store is None:
            said, digest = self._channel.hear_json()
            return Path(said), digest
        file = self._store.write(row, units)
        assert file is not None and isinstance(file.source, Path)
        self._channel.tell_json([str(file.source), file.header_sha256])
        return file.source, file.header_sha256

    def _of_all(self, layer: int, positions: range, cache: ContextKVCache) -> Block | None:
        """On the first rank (1, H_kv, all of them, D), elsewhere None."""
        if not positions:
            shape = (1, self._config.num_key_value_heads, 0, self._config.head_dim)
            return None if self._store is None else Block(*(torch.empty(shape, dtype=cache.dtype) for _ in range(2)))
        keys, values = (self._gathered(x, positions) for x in cache.copied(layer, positions))
        return None if keys is None or values is None else Block(keys, values)

    def _gathered(self, x: Tensor, positions: range) -> Tensor | None:
        """This rank's heads and tokens (1, H_i, n, D) -> on the first rank (1, H_kv, all, D)."""
        pieces = list(ContextRank(0, self._context).pieces(positions, self._config.attention_chunk_size))
        tokens = [sum(len(piece.positions) for piece in pieces if piece.owner == n) for n in range(self._context)]
        padded = x.new_zeros(1, x.shape[1], max(tokens), x.shape[3])
        padded[:, :, : x.shape[2]] = x
        content = padded.view(torch.uint8)
        if self._store is None:
            self._channel.exchange.to_first(content)
            return None
        found = [torch.empty_like(padded) for _ in range(self._tensor * self._context)]
        self._channel.exchange.to_first(content, [part.view(torch.uint8) for part in found])
        whole = x.new_empty(1, self._config.num_key_value_heads, len(positions), x.shape[3])
        for number, part in enumerate(found):
            heads, start = kv_heads(self._config, TensorRank(number % self._tensor, self._tensor)), 0
            for owner, here in pieces:
                if owner == number // self._tensor:
                    there = slice(here.start - positions.start, here.stop - positions.start)
                    whole[:, heads.start : heads.stop, there] = part[:, :, start : start + len(here)]
                    start += len(here)
        return whole
