"""The ways to make a model compute the logits of a whole sequence. All must agree.

Add a new way (a cache, a driver) to PATHS: the oracle suite and the mutation controls then run it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.kernels.attend import KVSegment
from model.transformer import Transformer


class NaiveCache:
    """Keeps everything, one segment per forward, for all layers; masks alone decide what is visible."""

    def __init__(self, length: int) -> None:
        self.offset = 0
        self.length = length
        self.stored: dict[int, list[KVSegment]] = defaultdict(list)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.stored[layer].append(KVSegment(keys, values, self.offset))

    def segments(self, layer: int, queries: range) -> Iterator[KVSegment]:
        yield from self.stored[layer]

    def advance(self, num_tokens: int) -> None:
        self.offset += num_tokens


def full(model: Transformer, ids: Tensor) -> Tensor:
    """The plain forward without a cache."""
    logits = model(ids, logits="all")
    assert logits is not None
    return logits


def naive_pieces(model: Transformer, ids: Tensor) -> Tensor:
    """Forwards of 1, 5, 14, 1, 5, 14, ... tokens: shorter and longer than an attention chunk of 7, and across ends."""
    cache = NaiveCache(ids.shape[1])
    pieces, sizes = [], (1, 5, 14)
    while cache.offset < ids.shape[1]:
        piece = ids[:, cache.offset : cache.offset + sizes[len(pieces) % 3]]
        logits = model(piece, cache=cache, logits="all")
        assert logits is not None
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


PATHS: dict[str, Callable[[Transformer, Tensor], Tensor]] = {
    "full": full,
    "naive_pieces": naive_pieces,
}
