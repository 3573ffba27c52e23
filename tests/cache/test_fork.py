"""Continuations of a shared cache against a naive cache that keeps everything, at all boundaries."""

from __future__ import annotations

import pytest

from cache import fork as fork_module
from cache.fork import ForkedKVCache
from cache.hybrid import HybridKVCache
from cache.residency import fork_bytes
from support.cache_toys import CHUNK, CONFIG, LAYERS, Naive, make, pieces, step, storage_bytes


def documents(tokens: int, **options: object) -> tuple[HybridKVCache, Naive]:
    cache = make(block_chunks=2, length=120, **options)  # type: ignore[arg-type]
    naive = Naive.of(cache)
    for count in pieces(tokens, tokens):
        step(cache, naive, count)
    return cache, naive


@pytest.fixture(params=[1, 4, 512])
def piece_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fork_module, "PIECE_TOKENS", request.param)
    return int(request.param)


@pytest.mark.usefixtures("piece_tokens")
@pytest.mark.parametrize("first", [0, 3, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 4 * CHUNK + 3])
def test_forks_see_what_a_cache_of_their_own_would_hold(first: int) -> None:
    """Several in turns, in pieces of all lengths, past ends of chunks and of blocks."""
    cache, naive = documents(first)
    held = cache.held()
    runs = [(ForkedKVCache(cache, room), naive.fork(), room) for room in (1, CHUNK, 3 * CHUNK + 2, 60)]
    steps = [list(pieces(first + room, room)) for _, _, room in runs]
    while any(steps):
        for (fork, kept, _), left in zip(runs, steps, strict=True):
            if left:
                step(fork, kept, left.pop())
    for fork, _, room in runs:
        assert fork.offset == first + room and fork.length == 120 and fork.room <= 0
        everything: dict[int, int] = {}
        storage_bytes(fork._pieces, everything)
        assert sum(everything.values()) == fork.nbytes == fork_bytes(cache.layout, room)
        with pytest.raises(AssertionError, match="with room for"):
            step(fork, naive, 1)
    assert cache.offset == first and cache.held() == held


@pytest.mark.usefixtures("piece_tokens")
def test_what_is_not_committed_leaves_no_trace() -> None:
    cache, naive = documents(2 * CHUNK + 3)
    fork = ForkedKVCache(cache, 40)
    for count in pieces(3, 30):
        step(fork, naive, min(count + 2, 40 - (fork.offset - cache.offset)), commit=False)
        step(fork, naive, count)


def test_tokens_are_taken_back_within_a_chunk() -> None:
    cache, naive = documents(2 * CHUNK + 3)
    fork = ForkedKVCache(cache, 40)
    assert fork.room == CHUNK - 4
    step(fork, naive.fork(), fork.room)
    fork.rewind(cache.offset + 1)
    assert fork.offset == cache.offset + 1
    with pytest.raises(AssertionError):
        fork.rewind(cache.offset - 1)
    fork.rewind(cache.offset)
    for count in pieces(5, 40):
        step(fork, naive, count)


def test_what_is_shared_comes_first_and_once() -> None:
    """With `within`, as several sequences ask for it. RoPE layers are not cut."""
    first = 4 * CHUNK + 3
    cache, naive = documents(first)
    forks = [ForkedKVCache(cache, 20) for _ in range(3)]
    for fork in forks:
        step(fork, naive.fork(), 5)
    assert forks[0].shared_tokens(forks[1:]) == first
    other = ForkedKVCache(documents(first)[0], 20)
    assert forks[0].shared_tokens([other]) == 0
    queries = range(first + 4, first + 5)
    for layer in LAYERS:
        if CONFIG.uses_rope(layer):
            continue
        shared = [segment.positions for segment in forks[1].segments(layer, queries, range(first))]
        assert [p for positions in shared for p in positions] == list(range(first))
        own = [segment.positions for segment in forks[1].segments(layer, queries, range(first, first + 5))]
        assert own == [range(first, first + 5)]


def test_the_shared_cache_must_not_change() -> None:
    cache, naive = documents(CHUNK + 3)
    fork = ForkedKVCache(cache, 20)
    step(fork, naive.fork(), 2)
    step(cache, naive, 1)
    with pytest.raises(AssertionError, match="has changed"):
        list(fork.segments(1, range(CHUNK + 4, CHUNK + 5)))
