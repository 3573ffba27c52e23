"""Every path through the cache gives the logits of `transformers`' full forward; equal grids give equal bits, wherever
the blocks lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache import layout as store_layout
from cache.disk import UnitFile
from cache.grid import grid_period
from cache.offloaded import OffloadedKVCache
from cache.residency import Residency
from l4ctx.engine.prefill import prefill
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.cached_paths import (
    CACHED_PATHS,
    STORED_PATHS,
    SavedRows,
    failing,
    feed,
    forked,
    grid_cuts,
    new_cache,
    on_the_grid,
    scratch,
)
from support.error_budget import difference
from support.toy_checkpoints import CHUNK, KINDS, MATRIX, Toys

CASES = {  # (batch, length) by standard deviation of the weights and attention backend
    (0.25, "sdpa"): (1, 61),
    (0.02, "sdpa"): (2, 20),
    (0.25, "eager"): (2, 19),
    (0.02, "eager"): (1, 2 * CHUNK + 1),
}

NOPE_ELSEWHERE = ("nope_first", "nope_only_last")

EVERYWHERE = ("scout", "maverick", "bfloat16")
"""Kinds that take every path in every case; each other kind takes every path in one case, which turns."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.matrix) if name in MATRIX else name for name in KINDS]
)
def test_every_path_equals_transformers(toys: Toys, name: str) -> None:
    found = {}
    turn = list(KINDS).index(name)
    for place, ((std, backend), (batch, length)) in enumerate(CASES.items()):
        toy = toys(name, std)
        model = load_checkpoint(toy.folder, dtype=torch.float32, attention=backend)
        ids, expected = toy.case(batch, length)
        for number, (path_name, path) in enumerate(CACHED_PATHS.items()):
            if name not in EVERYWHERE and (number + turn) % len(CASES) != place:
                continue
            logits = path(model, ids)
            case = f"{path_name}, {backend}, std {std}, {batch}x{length}"
            found[case] = difference(logits, expected) / toy.limit(batch, length)
    assert len(found) >= len(CACHED_PATHS)
    wrong = {case: value for case, value in found.items() if not value <= 1}  # a NaN is wrong
    assert not wrong


@pytest.mark.parametrize(
    ("name", "std", "backend", "dtype"),
    [
        ("scout", 0.25, "sdpa", torch.float32),
        *(pytest.param(name, 0.25, "sdpa", torch.float32, marks=pytest.mark.matrix) for name in NOPE_ELSEWHERE),
        ("maverick", 0.02, "eager", torch.float32),
        pytest.param("bfloat16", 0.25, "sdpa", torch.bfloat16, marks=pytest.mark.matrix),
    ],
)
def test_where_blocks_lie_changes_no_bit(toys: Toys, name: str, std: float, backend: str, dtype: torch.dtype) -> None:
    """On disk, promoted, restored: the logits of the path that takes the same steps in memory, and `transformers`'."""
    toy = toys(name, std)
    model = load_checkpoint(toy.folder, dtype=dtype, attention=backend)
    cases = ((1, 61), (2, 33)) if name == "scout" else ((1, 61),)
    for case in cases:
        (ids, expected), wrong = toy.case(*case), {}
        for path_name, (stored, in_memory) in STORED_PATHS.items():
            logits, straight = stored(model, ids), in_memory(model, ids)
            error = difference(logits, expected)
            if not torch.equal(logits, straight) or (dtype == torch.float32 and not error <= toy.limit(*case)):
                wrong[path_name] = error
        assert not wrong


@pytest.mark.parametrize("name", STORED_PATHS)
def test_the_stored_paths_read_from_disk(
    scout: Transformer, toys: Toys, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = [], UnitFile.read
    monkeypatch.setattr(UnitFile, "read", lambda self, unit, into: (read.append(unit), original(self, unit, into)))
    stored, in_memory = STORED_PATHS[name]
    in_memory(scout, toys("scout", 0.25).case(1, 61)[0])
    assert not read
    stored(scout, toys("scout", 0.25).case(1, 61)[0])
    nope_layers = [layer for layer in range(8) if not scout.config.uses_rope(layer)]
    assert {int(unit.split(".")[0]) for unit in read} == set(nope_layers) and len(read) >= 8


@pytest.mark.parametrize("offset", [1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 4 * CHUNK, 60])
def test_a_restored_run_takes_the_steps_that_were_left(
    toys: Toys, scout: Transformer, tmp_path: Path, offset: int
) -> None:
    """A prefill that stopped anywhere resumes in another cache, with the tail restored from a file: equal bits."""
    ids, _ = toys("scout", 0.25).case(1, 61)
    tokens = ids[0, :-1].tolist()
    straight = new_cache(scout, ids, block_chunks=2, segment_chunks=1)
    saved = SavedRows(tmp_path)
    stopped = new_cache(scout, ids, block_chunks=2, segment_chunks=1, rows=saved)
    for part in (tokens[:offset], tokens[offset:]):
        list(prefill(scout, straight, part, prefill_chunk_size=CHUNK - 2))
    list(prefill(scout, stopped, tokens[:offset], prefill_chunk_size=CHUNK - 2))
    tail = stopped.tail()
    assert all(x.is_contiguous() and x.device.type == "cpu" for block in tail.values() for x in block)
    with scratch() as rows:
        for where in ({}, {"residency": Residency(host_rows=0), "rows": rows}, {"rows": saved}):
            resumed = new_cache(scout, ids, block_chunks=2, segment_chunks=1, **where)
            resumed.restore(offset, saved.reopened(offset // (2 * CHUNK)), tail=tail)
            assert resumed.offset == offset
            list(prefill(scout, resumed, tokens[offset:], prefill_chunk_size=CHUNK - 2))
            assert torch.equal(scout(ids[:, -1:], resumed), scout(ids[:, -1:], straight.fork()))
    assert saved.written == list(range(61 // (2 * CHUNK)))


@pytest.mark.parametrize("size", [CHUNK - 2, CHUNK, 3 * CHUNK - 1, 4 * CHUNK])
def test_a_run_goes_on_from_whole_blocks_at_every_period(
    toys: Toys, scout: Transformer, tmp_path: Path, size: int
) -> None:
    """Only the blocks are kept, and the last may be used in part: equal bits."""
    ids, _ = toys("scout", 0.25).case(1, 61)
    tokens, block = ids[0, :-1].tolist(), 4 * CHUNK
    saved = SavedRows(tmp_path)
    straight = new_cache(scout, ids, block_chunks=4, segment_chunks=2, rows=saved)
    list(prefill(scout, straight, tokens, prefill_chunk_size=size))
    expected = scout(ids[:, -1:], straight.fork())
    period = grid_period(size, CHUNK, block)
    for offset in range(period, len(saved.files) * block + 1, period):
        resumed = new_cache(scout, ids, block_chunks=4, segment_chunks=2)
        rows = offset // block
        resumed.restore(offset, saved.reopened(rows), partial=saved.reopened()[rows] if offset % block else None)
        list(prefill(scout, resumed, tokens[offset:], prefill_chunk_size=size))
        assert torch.equal(scout(ids[:, -1:], resumed), expected)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_short_sequences(toys: Toys, length: int) -> None:
    toy = toys("maverick", 0.25)
    model = load_checkpoint(toy.folder, dtype=torch.float32)
    ids, expected = toy.case(3, length)
    paths = {
        name: CACHED_PATHS[name]
        for name in ("token by token", "irregular pieces", "one piece", "forked", "repeated after failures")
    }
    paths |= {name: stored for name, (stored, _) in STORED_PATHS.items() if "continued" not in name}
    for name, path in paths.items():
        assert difference(path(model, ids), expected) <= toy.limit(3, length), name


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
    toy = toys("scout", 0.25)
    ids, expected = toy.case(1, 61)
    for block_chunks, segment_chunks, sealed, opened in (
        (1, 1, 8, 1),
        (2, 1, 4, 1),
        (2, 2, 4, 1),
        (4, 1, 2, 1),
        (4, 2, 2, 1),
        (4, 4, 2, 1),
        (6, 2, 1, 2),
        (100, 1, 0, 9),
        (100, 100, 0, 1),
    ):
        cache = new_cache(scout, ids, block_chunks=block_chunks, segment_chunks=segment_chunks)
        logits = feed(scout, cache, ids, grid_cuts(0, 61, CHUNK - 2, CHUNK))
        for store in cache.stores:
            assert (len(store.sealed), len(store.open)) == (sealed, opened)
            assert {len(block.segments) for block in store.sealed} <= {block_chunks // segment_chunks}
        assert difference(logits, expected) <= toy.limit(1, 61)


def test_the_paths_seal_blocks_and_share_them(toys: Toys, scout: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths above are worth something: with the toy's sizes they do seal and share several blocks."""
    ids, _ = toys("scout", 0.25).case(1, 61)
    sealed, kept = [], []
    original = OffloadedKVCache.fork

    def fork(store: OffloadedKVCache, offset: int) -> OffloadedKVCache:
        made = original(store, offset)
        kept.append([a is b for a, b in zip(store.sealed, made.sealed, strict=True)])
        sealed.append(len(store.sealed))
        return made

    monkeypatch.setattr(OffloadedKVCache, "fork", fork)
    forked(scout, ids)
    assert max(sealed) >= 3 and min(sealed) == 0 and all(all(shared) for shared in kept)
    assert (
        store_layout.MIN_BLOCK_BYTES == 16 * 2**20 and store_layout.MIN_SEGMENT_TOKENS == 8192
    )  # `new_cache` has put them back


def test_batch_rows_do_not_mix(toys: Toys, scout: Transformer) -> None:
    """A row gives the same logits whatever its neighbours are."""
    toy = toys("scout", 0.25)
    ids, _ = toy.case(3, CHUNK * 2)
    path = on_the_grid(lambda chunk: chunk - 2)
    together = path(scout, ids)
    for row in range(3):
        alone = path(scout, ids[row : row + 1])
        largest = together.abs().max()
        assert (alone - together[row : row + 1]).abs().max() <= toy.limit(3, CHUNK * 2) * largest
