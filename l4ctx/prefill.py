"""The chunked-prefill driver: streams token ids through the model into a cache, one prefill chunk at a time.

A generator that yields progress after every step; activations are bounded by the chunk, whatever the length. Knows
nothing of text, terminals or sampling.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.hybrid import HybridKVCache
from l4ctx.memory import give_back_free_memory
from model.transformer import Transformer

DEFAULT_PREFILL_CHUNK_SIZE = 8192


@dataclass(frozen=True)
class PrefillProgress:
    """`done` of `total` tokens are in the cache, `seconds` after the start of this prefill."""

    done: int
    total: int
    seconds: float


def prefill_grid(start: int, stop: int, prefill_chunk_size: int, attention_chunk_size: int) -> Iterator[range]:
    """Positions start .. stop - 1 cut on an absolute grid, so that any run over the same tokens takes the same steps.

    Prefill chunks at least as long as an attention chunk are cut at multiples of a whole number of those; shorter
    ones are counted from each attention chunk's start and none crosses a boundary.
    """
    assert prefill_chunk_size > 0
    if prefill_chunk_size >= attention_chunk_size:
        step = period = prefill_chunk_size // attention_chunk_size * attention_chunk_size
    else:
        step, period = prefill_chunk_size, attention_chunk_size
    while start < stop:
        begin = start // period * period
        cut = min(begin + ((start - begin) // step + 1) * step, begin + period, stop)
        yield range(start, cut)
        start = cut


def prefill(model: Transformer, cache: HybridKVCache, ids: Sequence[int], *,
            prefill_chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE) -> Iterator[PrefillProgress]:
    """Reads `ids` behind what the cache holds, as keys and values only: no logits are computed.

    A step that does not finish leaves the cache where the last yielded progress says.
    """
    began, base = time.perf_counter(), cache.offset
    grid = prefill_grid(base, base + len(ids), prefill_chunk_size, model.config.attention_chunk_size)
    for positions in grid:
        model(as_batch(ids[positions.start - base:positions.stop - base], model.device), cache, logits="none")
        give_back_free_memory()
        yield PrefillProgress(positions.stop - base, len(ids), time.perf_counter() - began)


def as_batch(ids: Sequence[int], device: torch.device) -> Tensor:
    """One row of token ids, (1, T) int64."""
    if isinstance(ids, array | memoryview):
        assert ids.itemsize == 4, "token ids lie in 32-bit arrays"
        row = torch.frombuffer(ids, dtype=torch.int32)
    else:
        row = torch.as_tensor(ids)
    return row.to(device=device, dtype=torch.int64)[None]
