"""A saved context that tensor ranks fill: the first one writes the KV heads of all.

So the folder is the same whatever the number of ranks, with one writer and one journal.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cache.blocks import Block
from cache.disk import UnitFile, Units
from cache.heads import Heads, HeadsFile
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.tiers import RowStore
from l4ctx.run.channel import Channel
from model.config import TextConfig
from model.division import TensorRank, kv_heads


class RankRows:
    """A `cache.tiers.RowStore`. All ranks seal a row at the same token, so that all are here together."""

    is_durable = True

    def __init__(
        self, channel: Channel, config: TextConfig, layout: StoreLayout, store: RowStore | None = None
    ) -> None:
        """`config` is the whole model's, `layout` this rank's; the first rank has the `store`."""
        self._channel, self._layout, self._store = channel, layout, store
        rank = channel.exchange.rank
        self.heads = heads_of(config, rank)
        self._places = [kv_heads(config, TensorRank(number, rank.count)) for number in range(rank.count)]

    def write(self, row: int, units: Units) -> UnitFile:
        """Raises what the store raises."""
        whole: dict[str, list[tuple[str, Tensor]]] = {}
        for unit, tensors in units.items():
            whole[unit] = [(name, self._of_all(x)) for name, x in tensors]
        if self._store is not None:
            file = self._store.write(row, whole)
            assert file is not None and isinstance(file.source, Path)
            self._channel.tell_json([str(file.source), file.header_sha256])
            source, digest = file.source, file.header_sha256
        else:
            said, digest = self._channel.hear_json()
            source = Path(said)
        return HeadsFile(source, header_sha256=digest, layout=self._layout, heads=self.heads)

    def tail(self, cache: HybridKVCache) -> dict[int, Block]:
        """On the first rank, the tail of a cache of all KV heads."""
        return {layer: Block(*(self._of_all(x) for x in block)) for layer, block in cache.tail().items()}

    def _of_all(self, x: Tensor) -> Tensor:
        """This rank's heads (1, H_i, ...) -> on the first rank (1, H_kv, ...), elsewhere nothing of use."""
        content = x.contiguous().view(torch.uint8)
        if self._store is None:
            self._channel.exchange.to_first(content)
            return x
        whole = x.new_empty(1, self.heads.total, *x.shape[2:])
        places = whole.view(torch.uint8)
        # several ranks may hold the same heads, and then the same bits
        self._channel.exchange.to_first(content, [places[:, here.start : here.stop] for here in self._places])
        return whole


def tensor_rank(rank: TensorRank, context_ranks: int) -> TensorRank:
    """The place of one of all processes among those that have the same tokens: tensor ranks are the inner axis."""
    count = rank.count // context_ranks
    return TensorRank(rank.number % count, count)


def heads_of(config: TextConfig, rank: TensorRank) -> Heads:
    """`config` is the whole model's."""
    return Heads(kv_heads(config, rank), config.num_key_value_heads)
