"""Fills, restores and compares caches with sealed blocks in every tier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.residency import Residency
from support.cache_toys import CHUNK, CONFIG, LAYERS, make, pieces, random_keys_values
from support.cached_paths import SavedRows

BLOCK = 2 * CHUNK


def shown(cache: HybridKVCache, layer: int, queries: range) -> list[tuple[int, Tensor, Tensor]]:
    """What the layer's attention would see. Copied, because each segment is valid only until the next."""
    return [(s.start, s.keys.clone(), s.values.clone()) for s in (x.plain for x in cache.segments(layer, queries))]


def same(a: list[tuple[int, Tensor, Tensor]], b: list[tuple[int, Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and all(torch.equal(t, u) and t.dtype == u.dtype for t, u in zip(x[1:], y[1:], strict=True))
        for x, y in zip(a, b, strict=True)
    )


def together(caches: Sequence[HybridKVCache], tokens: int, *, layers: Sequence[int] = LAYERS) -> None:
    """One forward of each cache with the same new tokens; all must show what the first one does."""
    offset = caches[0].offset
    assert {cache.offset for cache in caches} == {offset}
    for layer in layers:
        new = random_keys_values(caches[0], tokens)
        for cache in caches:
            cache.append(layer, *new)
        expected = shown(caches[0], layer, range(offset, offset + tokens))
        assert expected[-1][0] + expected[-1][1].shape[2] == offset + tokens
        for cache in caches[1:]:
            assert same(shown(cache, layer, range(offset, offset + tokens)), expected), (layer, cache.residency)
    if layers == LAYERS:
        for cache in caches:
            cache.advance(tokens)


def filled(tokens: int, folder: Path, seed: int = 0, **how: object) -> tuple[HybridKVCache, SavedRows]:
    """A cache that has read `tokens` tokens, and the store with its saved rows."""
    saved = SavedRows(folder)
    cache = make(rows=saved, **how)  # type: ignore[arg-type]
    for count in pieces(seed, tokens):
        together([cache], count)
    return cache, saved


def restored(
    cache: HybridKVCache, saved: SavedRows, host_rows: int | None = None, *, rows: Scratch | SavedRows | None = None
) -> HybridKVCache:
    other = HybridKVCache(
        CONFIG,
        batch_size=cache.batch_size,
        dtype=cache.dtype,
        length=cache.length,
        layout=cache.layout,
        residency=Residency(host_rows),
        rows=rows,
    )
    other.restore(cache.offset, saved.reopened(cache.offset // cache.layout.block_tokens), tail=cache.tail())
    return other
