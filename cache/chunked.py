"""The cache of one RoPE layer: keys and values of the current attention chunk, and nothing older.

At a multiple of the attention chunk the window is empty. The committed offset, which the caller passes, is the only
truth: it tells which tokens a failed forward has left behind, and those are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cache.blocks import Block
from model.gpu.support import LayerPages
from model.kernels.attend import KVSegment


class ChunkedKVCache:
    """`window` holds one attention chunk, or the whole run if that is shorter."""

    def __init__(self, window: Block, chunk_size: int) -> None:
        self.window = window
        self.chunk_size = chunk_size
        self._new: Block | None = None  # the current forward's tokens, where they do not fit into the window
        self._tail: tuple[int, Block] | None = None  # start and tokens of their last chunk, not committed yet
        self._first = self._stop = 0  # position of the first visible token, and one past the last

    def append(self, offset: int, keys: Tensor, values: Tensor) -> None:
        """Appends tokens (B, H_kv, T, D) at `offset`. Those within the current chunk go straight into the window."""
        self._new = None
        self.settle(offset)
        used = offset % self.chunk_size
        tokens = keys.shape[2]
        self._first, self._stop = offset - used, offset + tokens
        if used + tokens <= self.chunk_size:
            self.window.keys[:, :, used : used + tokens] = keys
            self.window.values[:, :, used : used + tokens] = values
        else:
            self._new = Block(keys, values)

    def reserve(self, offset: int, stop: int) -> None:
        """The tokens from `offset` to before `stop`, within one chunk, will be written into the window."""
        self._new = None
        self.settle(offset)
        self._first, self._stop = offset - offset % self.chunk_size, stop

    def pages(self) -> LayerPages:
        """The window, whose first token is the chunk's."""
        return LayerPages(self.window.keys.shape[2], [(self.window.keys, self.window.values)])

    def segments(self) -> Iterator[KVSegment]:
        if self._new is None:
            yield KVSegment(*self.window.first(self._stop - self._first), self._first, stays=True)
            return
        offset = self._stop - self._new.keys.shape[2]
        if offset > self._first:
            yield KVSegment(*self.window.first(offset - self._first), self._first, stays=True)
        yield KVSegment(*self._new, offset, stays=True)

    def finish(self) -> None:
        """Called when this layer's attention is done: of a long forward's tokens only the last chunk's are kept.

        They stay beside the window while that holds tokens which a repetition of the forward would need.
        """
        if self._new is None:
            return
        new, self._new = self._new, None
        offset, rest = self._stop - new.keys.shape[2], self._stop % self.chunk_size
        if rest == 0:
            return
        tail = Block(*(x[:, :, -rest:] for x in new))
        if offset % self.chunk_size == 0:
            self.window.first(rest).copy_from(tail)
        else:
            self._tail = self._stop - rest, Block(*(x.clone() for x in tail))

    def settle(self, offset: int) -> None:
        """Moves the tail of the last forward into the window if it was committed, else drops it."""
        self.finish()
        if self._tail is not None:
            start, tail = self._tail
            if offset == start + tail.keys.shape[2]:
                self.window.first(tail.keys.shape[2]).copy_from(tail)
            self._tail = None

    def restore(self, used: Block) -> None:
        """Starts with these tokens of the current attention chunk."""
        self.window.first(used.keys.shape[2]).copy_from(used)

    def fork(self, offset: int) -> ChunkedKVCache:
        """A copy that has committed `offset` tokens."""
        self.settle(offset)
        forked = ChunkedKVCache(Block(*(torch.empty_like(x) for x in self.window)), self.chunk_size)
        used = offset % self.chunk_size
        forked.window.first(used).copy_from(self.window.first(used))
        return forked

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + (self._tail[1].nbytes if self._tail else 0)
