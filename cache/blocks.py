"""Keys and values of consecutive tokens in one layer, in the dtype that the model computes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cache.layout import StoreLayout


class Block(NamedTuple):
    """Keys and values of consecutive tokens in one layer, each (B, H_kv, S, D), head-major, in the compute dtype."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def first(self, tokens: int) -> Block:
        """A view of the first tokens."""
        return Block(self.keys[:, :, :tokens], self.values[:, :, :tokens])

    def within(self, here: slice) -> Block:
        """A view of these tokens."""
        return Block(self.keys[:, :, here], self.values[:, :, here])

    def copy_from(self, other: Block) -> None:
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)


def empty_block(layout: StoreLayout, tokens: int, device: torch.device) -> Block:
    config = layout.config
    shape = (layout.batch_size, config.num_key_value_heads, tokens, config.head_dim)
    dtype = getattr(torch, layout.dtype)
    return Block(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))


def joined(blocks: Sequence[Block]) -> Block:
    """Blocks one behind the other, in contiguous memory of their own."""
    keys, values = (torch.cat([block[n] for block in blocks], 2) for n in range(2))
    return Block(keys, values)
