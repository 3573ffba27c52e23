"""The cache of one NoPE layer: all keys and values, in blocks of fixed size that are never copied as it grows.

The last block is open and lies where the model computes. Once full it is sealed: immutable, moved to host memory,
shared by forks. Knows nothing of other layers. The committed offset, which the caller gives, is the only truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cache.tiers import Block, staged, to_host
from model.backends import KVSegment


class OffloadedKVCache:
    """`new_block(start)` allocates the block whose first token is at position `start`."""

    def __init__(self, block_tokens: int, new_block: Callable[[int], Block], device: torch.device) -> None:
        self.block_tokens = block_tokens
        self.device = device
        self.blocks: list[Block] = []  # block i begins at position i * block_tokens
        self.num_sealed = 0
        self._new_block = new_block
        self._stop = 0  # position behind the last token, new ones included

    def append(self, offset: int, keys: Tensor, values: Tensor) -> None:
        """Tokens (B, H_kv, T, D) at `offset`, into the open block and as many further ones as they need."""
        self.settle(offset)
        done, tokens = 0, keys.shape[2]
        while done < tokens:
            number, used = divmod(offset + done, self.block_tokens)
            if number == len(self.blocks):
                self.blocks.append(self._new_block(number * self.block_tokens))
            block = self.blocks[number]
            count = min(tokens - done, block.keys.shape[2] - used)
            block.keys[:, :, used:used + count] = keys[:, :, done:done + count]
            block.values[:, :, used:used + count] = values[:, :, done:done + count]
            done += count
        self._stop = offset + tokens

    def segments(self, num_queries: int) -> Iterator[KVSegment]:
        """One segment a block, oldest first."""
        start = 0
        for block in staged(self.blocks[:self.num_sealed], self.device, num_queries):
            yield KVSegment(*block, start)
            start += self.block_tokens
        for block in self.blocks[self.num_sealed:]:
            yield KVSegment(*block.first(self._stop - start), start)
            start += self.block_tokens
            if start >= self._stop:  # a block left over from a forward that did not finish
                break

    def settle(self, offset: int) -> None:
        """Seals the blocks that are full of committed tokens."""
        while (self.num_sealed + 1) * self.block_tokens <= offset:
            self.blocks[self.num_sealed] = to_host(self.blocks[self.num_sealed])
            self.num_sealed += 1

    def fork(self, offset: int) -> OffloadedKVCache:
        """A copy that has committed `offset` tokens: shares the sealed blocks and copies what is in the open one."""
        self.settle(offset)
        forked = OffloadedKVCache(self.block_tokens, self._new_block, self.device)
        forked.blocks = self.blocks[:self.num_sealed]
        forked.num_sealed = self.num_sealed
        start = self.num_sealed * self.block_tokens
        if offset > start:
            open_block = self._new_block(start)
            open_block.first(offset - start).copy_from(self.blocks[self.num_sealed].first(offset - start))
            forked.blocks.append(open_block)
        return forked

    def nbytes(self, *, on_host: bool) -> int:
        """Bytes of the blocks in host memory, or of those on an accelerator."""
        return sum(block.nbytes for block in self.blocks if block.is_on_host == on_host)
