"""Every path through the cache gives the logits of `transformers`' full forward; equal grids give equal bits."""

from __future__ import annotations

import pytest
import torch
from cached_paths import CACHED_PATHS, failing, feed, forked, grid_cuts, new_cache, on_the_grid
from torch import Tensor
from toy_checkpoints import CHUNK, KINDS, Toys

from cache import sizes
from l4ctx.prefill import prefill
from model.checkpoint import load_checkpoint
from model.transformer import Transformer

TOLERANCE = 1e-5  # of the oracle's largest logit
CASES = {  # (batch, length) by standard deviation of the weights and attention backend
    (0.25, "sdpa"): (1, 61), (0.02, "sdpa"): (2, 20), (0.25, "eager"): (2, 19), (0.02, "eager"): (1, 2 * CHUNK + 1)}


@pytest.mark.parametrize("name", KINDS)
def test_every_path_equals_transformers(toys: Toys, name: str) -> None:
    found = {}
    for (std, backend), (batch, length) in CASES.items():
        toy = toys(name, std)
        model = load_checkpoint(toy.folder, dtype=torch.float32, attention=backend)
        ids, expected = toy.case(batch, length)
        for path_name, path in CACHED_PATHS.items():
            logits = path(model, ids)
            assert logits.shape == expected.shape
            difference = ((logits - expected).abs().max() / expected.abs().max()).item()
            found[f"{path_name}, {backend}, std {std}, {batch}x{length}"] = difference
    wrong = {case: value for case, value in found.items() if not value <= TOLERANCE}  # a NaN is wrong
    assert not wrong


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_short_sequences(toys: Toys, length: int) -> None:
    toy = toys("maverick", 0.25)
    model = load_checkpoint(toy.folder, dtype=torch.float32)
    ids, expected = toy.case(3, length)
    for name in ("token by token", "irregular pieces", "one piece", "forked", "repeated after failures"):
        assert (CACHED_PATHS[name](model, ids) - expected).abs().max() <= TOLERANCE * expected.abs().max(), name


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_bfloat16_paths_stay_within_bfloat16s_own_error(toys: Toys, backend: str) -> None:
    """Not above the error that `transformers` makes in bfloat16 without a cache, by more than half.

    One routing decision that flips within rounding moves a whole row, hence the median over rows.
    """
    toy = toys("bfloat16", 0.25)  # its stored weights are bfloat16 numbers: all error is the arithmetic's
    ids, expected = toy.case(2, 33)
    theirs = type(toy.oracle).from_pretrained(toy.folder, dtype=torch.bfloat16)
    with torch.no_grad():
        budget = row_error(theirs(ids, use_cache=False).logits, expected)
    model = load_checkpoint(toy.folder, dtype=torch.bfloat16, attention=backend)
    errors = {name: row_error(path(model, ids), expected) for name, path in CACHED_PATHS.items()}
    assert all(0 < error <= 1.5 * budget for error in errors.values()), (budget, errors)


def row_error(logits: Tensor, expected: Tensor) -> float:
    return (logits.float() - expected).abs().flatten(0, 1).mean(-1).median().item()


@pytest.fixture
def scout(toys: Toys) -> Transformer:
    return load_checkpoint(toys("scout", 0.25).folder, dtype=torch.float32)


@pytest.mark.parametrize("path", ["prefill chunks smaller than an attention chunk", "irregular pieces", "forked"])
def test_a_path_taken_twice_gives_equal_bits(toys: Toys, scout: Transformer, path: str) -> None:
    ids, _ = toys("scout", 0.25).case(2, 33)
    assert torch.equal(CACHED_PATHS[path](scout, ids), CACHED_PATHS[path](scout, ids))


@pytest.mark.parametrize("size", [CHUNK - 2, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("fork_at", [1, 5, CHUNK, CHUNK + 5, 4 * CHUNK])
def test_equal_grid_gives_equal_bits_after_a_fork(toys: Toys, scout: Transformer, size: int, fork_at: int) -> None:
    """The read-and-forked run against one that feeds the same pieces into one cache."""
    ids, _ = toys("scout", 0.25).case(1, 61)
    cuts = [*grid_cuts(0, fork_at, size, CHUNK), *grid_cuts(fork_at, ids.shape[1], size, CHUNK)]
    straight = feed(scout, new_cache(scout, ids), ids, cuts)

    cache = new_cache(scout, ids)
    *_, last = prefill(scout, cache, ids[0, :fork_at].tolist(), prefill_chunk_size=size)
    assert last.done == cache.offset == fork_at
    forks = [cache.fork() for _ in range(2)]
    rest = [cut for cut in cuts if cut > fork_at]
    for fork in (*forks, cache):
        assert torch.equal(feed(scout, fork, ids, rest), straight[:, fork_at:])


@pytest.mark.parametrize("size", [CHUNK - 2, CHUNK, 3 * CHUNK])
def test_prefill_resumed_after_a_failure_gives_equal_bits(toys: Toys, scout: Transformer, size: int) -> None:
    """At every step a Ctrl-C; the rest is read by a new prefill from where the cache stands."""
    ids, _ = toys("scout", 0.25).case(1, 61)
    tokens = ids[0, :-1].tolist()
    straight, resumed = new_cache(scout, ids), new_cache(scout, ids)
    list(prefill(scout, straight, tokens, prefill_chunk_size=size))
    while resumed.offset < len(tokens):
        before = resumed.offset
        with failing(scout, before % 7, KeyboardInterrupt):
            next(prefill(scout, resumed, tokens[before:], prefill_chunk_size=size))
        assert resumed.offset == before
        next(prefill(scout, resumed, tokens[before:], prefill_chunk_size=size))
    assert torch.equal(scout(ids[:, -1:], resumed), scout(ids[:, -1:], straight))
    assert resumed.held() == straight.held()


def test_the_size_of_blocks_changes_nothing_but_rounding(toys: Toys, scout: Transformer) -> None:
    ids, expected = toys("scout", 0.25).case(1, 61)
    for block_chunks, blocks in ((1, 9), (2, 5), (4, 3), (100, 1)):
        cache = new_cache(scout, ids, block_chunks=block_chunks)
        logits = feed(scout, cache, ids, grid_cuts(0, 61, CHUNK - 2, CHUNK))
        nope_layer = cache.layers[scout.config.no_rope_layers.index(0)]
        assert len(nope_layer.blocks) == blocks
        assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_paths_seal_blocks_and_share_them(toys: Toys, scout: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths above are worth something: with the toy's sizes they do seal and share several blocks."""
    ids, _ = toys("scout", 0.25).case(1, 61)
    sealed = []
    original = type(new_cache(scout, ids)).fork

    def fork(cache):  # type: ignore[no-untyped-def]
        sealed.append(max(getattr(layer, "num_sealed", 0) for layer in cache.layers))
        return original(cache)

    monkeypatch.setattr("cache.hybrid.HybridKVCache.fork", fork)
    forked(scout, ids)
    assert max(sealed) >= 3 and min(sealed) == 0
    assert sizes.MIN_BLOCK_BYTES == 16 * 2**20  # `new_cache` has put it back


def test_batch_rows_do_not_mix(toys: Toys, scout: Transformer) -> None:
    """A row gives the same logits whatever its neighbours are."""
    ids, _ = toys("scout", 0.25).case(3, CHUNK * 2)
    path = on_the_grid(lambda chunk: chunk - 2)
    together = path(scout, ids)
    for row in range(3):
        alone = path(scout, ids[row:row + 1])
        assert (alone - together[row:row + 1]).abs().max() <= TOLERANCE * together.abs().max()
