"""The ways to compute the logits of a whole sequence through `HybridKVCache`, in the shape of paths.py's PATHS.

All of them use the smallest blocks there are, so that even toy runs seal some and leave one open.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from cache import sizes
from cache.hybrid import HybridKVCache
from l4ctx.prefill import prefill_grid
from model.transformer import Transformer

Path = Callable[[Transformer, Tensor], Tensor]


def new_cache(model: Transformer, ids: Tensor, *, block_chunks: int = 1) -> HybridKVCache:
    """For the whole of `ids` (B, T), with NoPE blocks of `block_chunks` attention chunks."""
    config, itemsize, batch_size = model.config, model.dtype.itemsize, ids.shape[0]
    chunk_bytes = config.attention_chunk_size * sizes.layer_bytes_per_token(config, itemsize, batch_size)
    with mock.patch.object(sizes, "MIN_BLOCK_BYTES", block_chunks * chunk_bytes):
        return HybridKVCache(config, length=ids.shape[1], batch_size=batch_size, dtype=model.dtype)


def feed(model: Transformer, cache: HybridKVCache, ids: Tensor, cuts: Iterable[int]) -> Tensor:
    """Logits (B, T, V) of all that follows the cache's offset in `ids`, fed in forwards that end at `cuts`."""
    pieces = []
    for cut in cuts:
        logits = model(ids[:, cache.offset:cut], cache, logits="all")
        assert logits is not None
        pieces.append(logits)
    assert cache.offset == ids.shape[1]
    return torch.cat(pieces, dim=1)


def grid_cuts(start: int, stop: int, prefill_chunk_size: int, attention_chunk_size: int) -> list[int]:
    return [step.stop for step in prefill_grid(start, stop, prefill_chunk_size, attention_chunk_size)]


def random_cuts(start: int, stop: int, seed: int, largest: int) -> list[int]:
    source, cuts = random.Random(seed), []
    while start < stop:
        start = min(stop, start + source.randint(1, largest))
        cuts.append(start)
    return cuts


def on_the_grid(size_for: Callable[[int], int]) -> Path:
    """Prefill chunks of `size_for(attention_chunk_size)` tokens."""
    def path(model: Transformer, ids: Tensor) -> Tensor:
        chunk = model.config.attention_chunk_size
        return feed(model, new_cache(model, ids), ids, grid_cuts(0, ids.shape[1], size_for(chunk), chunk))
    return path


def token_by_token(model: Transformer, ids: Tensor) -> Tensor:
    return feed(model, new_cache(model, ids, block_chunks=2), ids, range(1, ids.shape[1] + 1))


def irregular(model: Transformer, ids: Tensor) -> Tensor:
    """Pieces of up to three attention chunks that keep to no grid."""
    largest = 3 * model.config.attention_chunk_size
    return feed(model, new_cache(model, ids, block_chunks=2), ids, random_cuts(0, ids.shape[1], 5, largest))


def one_piece(model: Transformer, ids: Tensor) -> Tensor:
    return feed(model, new_cache(model, ids), ids, [ids.shape[1]])


def forked(model: Transformer, ids: Tensor) -> Tensor:
    """Forks of forks, at a boundary, inside a chunk and inside a block; each is misled by other tokens first."""
    chunk, stop = model.config.attention_chunk_size, ids.shape[1]
    pieces, cache = [], new_cache(model, ids, block_chunks=2)
    for cut in (*(c for c in (chunk, chunk + 3, 2 * chunk, 3 * chunk - 2) if c < stop), stop):
        sibling = cache.fork()
        pieces.append(model(ids[:, cache.offset:cut], cache, logits="all"))
        model(ids[:, sibling.offset:].flip(1), sibling, logits="none")  # writes other tokens, up to the very end
        cache = cache.fork()
    return torch.cat(pieces, dim=1)


def continued_by_the_fork(model: Transformer, ids: Tensor) -> Tensor:
    """The fork of a fork goes on while the caches that it came from read something else."""
    chunk, stop = model.config.attention_chunk_size, ids.shape[1]
    first, second = sorted({min(chunk + 2, stop - 1), min(2 * chunk + 1, stop - 1), stop - 1})[:2]
    cache = new_cache(model, ids)
    pieces = [model(ids[:, :first], cache, logits="all")]
    fork = cache.fork()
    pieces.append(model(ids[:, first:second], fork, logits="all"))
    fork_of_fork = fork.fork()
    for other in (cache, fork):
        model(ids[:, other.offset:].flip(1), other, logits="none")
    cuts = random_cuts(second, stop, 7, chunk + 2)
    return torch.cat([*pieces, feed(model, fork_of_fork, ids, cuts)], dim=1)


@contextmanager
def failing(model: Transformer, layer: int, error: type[BaseException] = RuntimeError) -> Iterator[None]:
    """Within it, forwards fail once `layer` has stored and attended: in its feed-forward."""
    def fail(*_: object) -> None:
        raise error("made to fail")

    handle = model.model.layers[layer].feed_forward.register_forward_pre_hook(fail)
    try:
        with pytest.raises(error, match="made to fail"):
            yield
    finally:
        handle.remove()


def repeated_after_failures(model: Transformer, ids: Tensor) -> Tensor:
    """Every step fails first, in another layer each time, with other and more tokens than when it is repeated."""
    pieces, cache = [], new_cache(model, ids)
    layers, chunk = model.config.num_hidden_layers, model.config.attention_chunk_size
    for number, cut in enumerate(random_cuts(0, ids.shape[1], 11, 2 * chunk)):
        for stop in (ids.shape[1], cut):
            with failing(model, (3 * number + 2) % layers):
                model(ids[:, cache.offset:stop].flip(1), cache)
        pieces.append(model(ids[:, cache.offset:cut], cache, logits="all"))
    return torch.cat(pieces, dim=1)


CACHED_PATHS: dict[str, Path] = {
    "prefill chunks smaller than an attention chunk": on_the_grid(lambda chunk: chunk - 2),
    "prefill chunks of one attention chunk": on_the_grid(lambda chunk: chunk),
    "prefill chunks that are no multiple": on_the_grid(lambda chunk: 2 * chunk + 3),
    "prefill chunks of three attention chunks": on_the_grid(lambda chunk: 3 * chunk),
    "token by token": token_by_token,
    "irregular pieces": irregular,
    "one piece": one_piece,
    "forked": forked,
    "continued by the fork of a fork": continued_by_the_fork,
    "repeated after failures": repeated_after_failures,
}
