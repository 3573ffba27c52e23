"""Chunked prefill: runs token ids through the model into a KV cache, one prefill chunk at a time.

A generator that yields progress after every step. Activation memory is bounded by the prefill chunk, whatever the
length. Images enter as embeddings.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cache.context import ContextKVCache
from cache.grid import prefill_grid
from cache.hybrid import HybridKVCache
from cache.residency import KVBytes
from l4ctx.machine.memory import give_back_free_memory
from model.transfers import Milestone, to_device
from model.transformer import LayerWatcher, Transformer
from model.weights.read_ahead import ahead

if TYPE_CHECKING:
    from l4ctx.vision.features import ImageFeatures

DEFAULT_PREFILL_CHUNK_SIZE = 8192

STEPS_AHEAD = {"cuda": 1}
"""By kind of device: steps that it has been given beyond the one that it computes, so that it never waits for one."""


@dataclass(frozen=True)
class PrefillProgress:
    """`done` of this prefill's `total` tokens are in the KV cache, `seconds` after it began."""

    start: int  # absolute position of this prefill's first token: earlier ones were in the cache already
    done: int
    total: int
    seconds: float
    step: range  # absolute positions of the step just finished
    step_seconds: float
    held: KVBytes | None  # size of the KV cache after that step


class LayerCount:
    """Watches which layer computes, or on a GPU is being begun, for progress within a step; tells `other`, too."""

    def __init__(self, other: LayerWatcher | None = None) -> None:
        self.layer = 0
        self.other = other

    @property
    def moves_weights(self) -> bool:
        return self.other is not None and self.other.moves_weights

    def entering(self, layer: int, tokens: int) -> None:
        self.layer = layer
        if self.other is not None:
            self.other.entering(layer, tokens)

    def leaving(self, layer: int, tokens: int) -> None:
        if self.other is not None:
            self.other.leaving(layer, tokens)


def prefill(
    model: Transformer,
    cache: HybridKVCache | ContextKVCache,
    ids: Sequence[int],
    *,
    prefill_chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE,
    features: ImageFeatures | None = None,
    observe: Callable[[range, Tensor], None] | None = None,
) -> Iterator[PrefillProgress]:
    """Appends the keys and values of `ids` to the KV cache; computes no logits.

    `observe` is given the positions of each step and what the head would multiply there, (1, T, C).
    A step is reported once it has been computed. A GPU has then been given the next one, and the host waits for
    nothing else. A step that fails leaves the cache as of the last step that was begun before: on a CPU, the last one
    that was yielded. `features` provides the images among `ids`. Raises ImageError for an image that cannot be decoded,
    and the model's LengthError.
    """
    began, base = time.perf_counter(), cache.offset
    grid = prefill_grid(
        base, base + len(ids), prefill_chunk_size, model.config.attention_chunk_size, cache.layout.block_tokens
    )

    def begin(positions: range) -> tuple[range, float, KVBytes, Milestone]:
        step_began = time.perf_counter()
        step_ids = ids[positions.start - base : positions.stop - base]
        inputs = _inputs(model, step_ids, positions, features)
        if observe is None:
            model(inputs, cache, logits="none")
        else:
            assert isinstance(cache, HybridKVCache), "context ranks tell no states"
            observe(positions, model.states(inputs, cache))
        return positions, step_began, cache.held(), Milestone(model.last_device)

    now = began
    for positions, step_began, held, end in ahead(grid, begin, STEPS_AHEAD.get(model.device.type, 0)):
        end.wait()
        give_back_free_memory()
        before, now = now, time.perf_counter()
        yield PrefillProgress(
            start=base,
            done=positions.stop - base,
            total=len(ids),
            seconds=now - began,
            step=positions,
            step_seconds=now - max(before, step_began),
            held=held,
        )


def _inputs(model: Transformer, ids: Sequence[int], positions: range, features: ImageFeatures | None) -> Tensor:
    """The token ids, or embeddings if there are images among them."""
    inputs = as_batch(ids, model.device)
    if features is None or not features.among(positions):
        return inputs
    embeddings = model.embed(inputs)
    features.splice(embeddings, as_batch(ids, torch.device("cpu")), positions)
    return embeddings


def as_batch(ids: Sequence[int], device: torch.device) -> Tensor:
    """One row of token ids, (1, T) int64."""
    if isinstance(ids, array | memoryview):
        assert ids.itemsize == 4, "token ids lie in 32-bit arrays"
        row = torch.frombuffer(ids, dtype=torch.int32)
    else:
        row = torch.as_tensor(ids)
    return to_device(row.to(torch.int64)[None], device)
