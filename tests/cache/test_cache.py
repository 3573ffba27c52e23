"""The caches against a naive store that keeps everything; their bytes against closed forms and against storages."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace

import pytest
import torch

from cache import layout as store_layout
from cache.blocks import empty_block
from cache.chunked import ChunkedKVCache
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.offloaded import OffloadedKVCache
from cache.residency import Residency, held_bytes, peak_bytes, rows_within
from cache.tiers import Tiers
from model.config import TextConfig
from support.cache_toys import (
    CHUNK,
    CONFIG,
    HEAD_DIM,
    HEADS,
    LAYERS,
    Naive,
    make,
    pieces,
    random_keys_values,
    step,
    storage_bytes,
)
from support.cached_paths import small_layout
from support.places import SHARED

ROPE_LAYERS, NOPE_LAYERS = 3, 2
LLAMA4 = SHARED / "llama4"


def addresses(store: OffloadedKVCache) -> list[int]:
    """Where the keys of its segments lie, sealed ones first."""
    sealed = [packed.keys for block in store.sealed for packed in block.segments if packed is not None]
    return [keys.data_ptr() for keys in (*sealed, *(block.keys for _, block in sorted(store.open.items())))]


@pytest.mark.parametrize(("block_chunks", "segment_chunks"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
@pytest.mark.parametrize("seed", range(6))
def test_segments_equal_a_naive_store(seed: int, block_chunks: int, segment_chunks: int) -> None:
    """The closed form, what it says it holds, and its storages agree after every step, up to the last token."""
    batch_size, dtype = (1, 2)[seed % 2], (torch.float32, torch.bfloat16)[seed // 2 % 2]
    length = 99 + seed
    cache = make(
        block_chunks=block_chunks, segment_chunks=segment_chunks, batch_size=batch_size, dtype=dtype, length=length
    )
    naive = Naive.of(cache)
    per_token = 2 * batch_size * HEADS * HEAD_DIM * dtype.itemsize
    segment = segment_chunks * CHUNK
    for tokens in pieces(seed, length):
        step(cache, naive, tokens)
        held = cache.held()
        assert held.rope_windows == ROPE_LAYERS * CHUNK * per_token
        filled = min(-(-cache.offset // segment) * segment, length)
        assert held.nope_host == held.nope == NOPE_LAYERS * filled * per_token
        assert held.total == held_bytes(cache.layout, cache.offset).total == storage_bytes(cache)
        assert (
            held == held_bytes(cache.layout, cache.offset) and held.nope_disk == held.buffers == held.nope_device == 0
        )
    assert cache.offset == length


@pytest.mark.parametrize("length", [1, 3, CHUNK, CHUNK + 1, 3 * CHUNK, 20, 256])
def test_nothing_is_allocated_beyond_the_length(length: int) -> None:
    cache = make(block_chunks=2, segment_chunks=2, length=length)
    naive = Naive.of(cache)
    per_token = 2 * HEADS * HEAD_DIM * 4
    assert cache.held().total == held_bytes(cache.layout, 0).total == ROPE_LAYERS * min(CHUNK, length) * per_token
    for tokens in pieces(length, length):
        step(cache, naive, tokens)
        assert cache.held().total == held_bytes(cache.layout, cache.offset).total == storage_bytes(cache)
    assert cache.held().nope == NOPE_LAYERS * length * per_token
    with pytest.raises(AssertionError, match=f"{length} \\+ 1 tokens in a cache made for {length}"):
        cache.append(0, *random_keys_values(cache, 1))


def test_the_default_length_is_the_models() -> None:
    assert HybridKVCache(CONFIG).length == CONFIG.max_position_embeddings


@pytest.mark.parametrize("shape", [(2, HEADS, 3, HEAD_DIM), (1, 6, 3, HEAD_DIM), (1, HEADS, 3, 9), (1, 3, HEADS, 10)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        make().append(0, torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(AssertionError):
        make().append(0, torch.zeros(1, HEADS, 3, HEAD_DIM), torch.zeros(shape))


@pytest.mark.parametrize("tokens", [1, CHUNK - 3, CHUNK, 2 * CHUNK + 3, 4 * CHUNK])
def test_the_appended_tensors_are_not_kept(tokens: int) -> None:
    """Not where they fit into the window, and not once committed: else a whole forward would stay in memory."""
    cache, alive = make(length=100), []
    step(cache, Naive.of(cache), 3)
    for layer in LAYERS:
        keys, values = random_keys_values(cache, tokens)
        alive += [weakref.ref(keys), weakref.ref(values)]
        cache.append(layer, keys, values)
        list(cache.segments(layer, range(3, 3 + tokens)))
    del keys, values
    if 3 + tokens <= CHUNK:
        assert not any(reference() is not None for reference in alive)
    cache.advance(tokens)
    assert [reference() for reference in alive] == [None] * 10
    assert storage_bytes(cache) == held_bytes(cache.layout, 3 + tokens).total


def test_a_window_is_empty_at_a_boundary_and_shows_nothing_older() -> None:
    cache = make(length=100)
    naive = Naive.of(cache)
    for tokens, start in ((CHUNK, 0), (2, CHUNK), (CHUNK - 2, CHUNK), (1, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK)):
        step(cache, naive, tokens, commit=False)
        assert next(iter(cache.segments(0, range(cache.offset, cache.offset + 1)))).start == start
        step(cache, naive, tokens)


@pytest.mark.parametrize("segment_chunks", [1, 2])
def test_what_is_stored_is_never_copied_as_it_grows(segment_chunks: int) -> None:
    """A segment is never moved, open or sealed, and the next one is allocated only when it is needed."""
    cache = make(block_chunks=2, segment_chunks=segment_chunks, length=150)
    naive = Naive.of(cache)
    known: list[list[int]] = [[] for _ in cache.stores]
    for tokens in pieces(3, 150):
        step(cache, naive, tokens)
        for number, store in enumerate(cache.stores):
            here = addresses(store)
            assert here[: len(known[number])] == known[number]
            known[number] = here
            assert len(store.sealed) == cache.offset // (2 * CHUNK)
            assert len(here) == -(-cache.offset // (segment_chunks * CHUNK))
    assert len({address for blocks in known for address in blocks}) == -(-150 // (segment_chunks * CHUNK)) * NOPE_LAYERS


def test_sealed_blocks_are_never_written_again() -> None:
    cache = make(block_chunks=2, length=130)
    naive = Naive.of(cache)
    step(cache, naive, 6 * CHUNK + 2)
    segments = [
        tensor
        for store in cache.stores
        for block in store.sealed
        for packed in block.segments
        if packed is not None
        for _, tensor in packed.tensors
    ]
    assert len(segments) == NOPE_LAYERS * 6 * 2
    versions = [tensor._version for tensor in segments]
    for tokens in pieces(1, 60):
        step(cache, naive, tokens)
    assert [tensor._version for tensor in segments] == versions


@pytest.mark.parametrize("first", [1, CHUNK, CHUNK + 3, 2 * CHUNK, 2 * CHUNK + 1, 4 * CHUNK, 5 * CHUNK - 1])
def test_fork_shares_what_is_sealed_and_copies_the_rest(first: int) -> None:
    """At and within chunks and blocks; the fork, its own fork and the parent continue in turns."""
    cache = make(block_chunks=2, length=120, batch_size=2)
    naive = Naive.of(cache)
    for tokens in pieces(first, first):
        step(cache, naive, tokens)
    fork, fork_naive = cache.fork(), naive.fork()
    assert fork.offset == cache.offset and fork.length == cache.length
    assert fork.held() == cache.held()
    assert [p for segment in fork.segments(1, range(first)) for p in segment.positions] == list(range(first))
    assert sealed(fork) == sealed(cache) and len(sealed(fork)) == NOPE_LAYERS * (first // (2 * CHUNK))
    shared: dict[int, int] = {}
    storage_bytes([store.sealed for store in cache.stores], shared)
    own, copied = storage_addresses(cache) - set(shared), storage_addresses(fork) - set(shared)
    assert len(own) == len(copied) and not own & copied

    step(fork, fork_naive, 3)
    second, second_naive = fork.fork(), fork_naive.fork()
    runs = [(cache, naive), (fork, fork_naive), (second, second_naive)]
    for tokens in pieces(100 + first, 60):
        for run, kept in runs:
            step(run, kept, tokens)
    assert [run.offset for run, _ in runs] == [first + 60, first + 63, first + 63]
    blocks = [[store.sealed[: first // (2 * CHUNK)] for store in run.stores] for run, _ in runs]
    assert blocks[0] == blocks[1] == blocks[2]
    assert all(run.held().total == held_bytes(run.layout, run.offset).total for run, _ in runs)


def sealed(cache: HybridKVCache) -> list[object]:
    return [block for store in cache.stores for block in store.sealed]


def storage_addresses(cache: HybridKVCache) -> set[int]:
    seen: dict[int, int] = {}
    storage_bytes(cache, seen)
    return set(seen)


def test_the_fork_of_an_empty_cache() -> None:
    cache = make(length=40)
    fork = cache.fork()
    for run in (fork, cache):
        naive = Naive.of(run)
        for tokens in (9, 14, 17):
            step(run, naive, tokens)


@pytest.mark.parametrize("stopped_after", LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_an_unfinished_step_leaves_nothing_behind(seed: int, stopped_after: int) -> None:
    """Longer and shorter attempts that never advance, then the step itself, then a fork: no attempt leaves a trace."""
    cache = make(block_chunks=1, length=120)
    naive = Naive.of(cache)
    source = random.Random(seed)
    for tokens in pieces(seed, 90):
        for tried in (source.randint(1, 120 - cache.offset), tokens, source.randint(1, 3)):
            for layer in range(stopped_after + 1):
                cache.append(layer, *random_keys_values(cache, tried))
                next(iter(cache.segments(layer, range(cache.offset, cache.offset + tried))))
        fork, fork_naive = cache.fork(), naive.fork()
        step(fork, fork_naive, tokens)
        step(cache, naive, tokens)
        assert cache.offset == fork.offset
        assert fork.held().total == held_bytes(fork.layout, fork.offset).total
    step(cache, naive, 120 - cache.offset)
    assert cache.held().total == held_bytes(cache.layout, 120).total == storage_bytes(cache)


def test_queries_that_are_only_the_last_ones() -> None:
    """`segments` is called for fewer queries than were appended, and still yields all keys that they may see."""
    cache = make(length=100)
    step(cache, Naive.of(cache), 2 * CHUNK + 3)
    for layer in LAYERS:
        cache.append(layer, *random_keys_values(cache, CHUNK + 2))
        shown = [p for s in cache.segments(layer, range(25, 26)) for p in s.positions]
        needed = range(21, 26) if CONFIG.uses_rope(layer) else range(26)
        assert set(needed) <= set(shown) and shown == list(range(shown[0], 26))


def llama4(name: str) -> TextConfig:
    if not LLAMA4.exists():
        pytest.skip("the released configurations are not at ../shared/llama4")
    return TextConfig.from_folder(LLAMA4 / name)


def test_scout_in_bfloat16() -> None:
    """The figures of the README: 48 KiB a token, windows of 1.125 GiB, 192 GiB for an unbounded million tokens."""
    scout = llama4("scout")
    assert store_layout.layer_bytes_per_token(scout, 2) == 4 * 1024
    assert store_layout.bytes_per_token(scout, 2) == 48 * 1024
    assert store_layout.unbounded_bytes(scout, 2**20, 2) == 192 * 2**30
    layout = StoreLayout.of(scout, length=2**20, dtype="bfloat16")
    assert layout.window_bytes == 1.125 * 2**30 and held_bytes(layout, 2**20).total == (48 + 1.125) * 2**30
    assert StoreLayout.of(scout, length=4096, dtype="bfloat16").window_bytes == 1.125 * 2**29
    assert (layout.block_tokens, layout.segment_tokens, layout.row_bytes) == (8192, 8192, 12 * 32 * 2**20)
    held = HybridKVCache(scout, dtype=torch.bfloat16, device="meta").held()
    assert held.rope_windows == held.total == 1.125 * 2**30


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_blocks_are_whole_chunks_of_at_least_16_mib(name: str) -> None:
    released = llama4(name)
    for chunk in (7, 512, 2731, 4096, 8192, 100_000):
        for itemsize, batch_size in ((2, 1), (4, 1), (2, 3)):
            config = replace(released, attention_chunk_size=chunk)
            tokens = store_layout.block_tokens(config, itemsize, batch_size)
            per_token = store_layout.layer_bytes_per_token(config, itemsize, batch_size)
            assert tokens % chunk == 0 and tokens * per_token >= 16 * 2**20
            assert (tokens - chunk) * per_token < 16 * 2**20
            segment = store_layout.segment_tokens(config, itemsize, batch_size)
            large_enough = [
                n
                for n in range(chunk, tokens + 1, chunk)
                if tokens % n == 0 and n >= 8192 and n * per_token >= 4 * 2**20
            ]
            assert segment == min(large_enough, default=tokens)


def test_the_cuts_depend_on_the_model_and_the_dtype_alone() -> None:
    """Neither length nor storage type moves them, so that what was saved fits any run."""
    for dtype in ("float32", "bfloat16"):
        layouts = [
            StoreLayout.of(CONFIG, length=length, dtype=dtype, kv_dtype=kv_dtype)
            for length in (1, 1000, 10**7)
            for kv_dtype in ("auto", *store_layout.KV_DTYPES)
        ]
        assert len({(layout.block_tokens, layout.segment_tokens) for layout in layouts}) == 1
        other = layouts[0].computed_in("float16")
        assert (other.dtype, other.kv_dtype, other.block_tokens) == ("float16", dtype, layouts[0].block_tokens)
        assert other.is_packed and not layouts[0].is_packed


@pytest.mark.parametrize("device_rows", [0, 1, 3, 100])
@pytest.mark.parametrize("host_rows", [None, 0, 1, 2, 100])
def test_every_row_has_one_place(host_rows: int | None, device_rows: int) -> None:
    residency = Residency(host_rows, device_rows, on_accelerator=True)
    for count in range(9):
        places = [
            "device" if age < device_rows else "host" if host_rows is None or age < device_rows + host_rows else "disk"
            for age in range(count)
        ]  # the newest first
        assert residency.split(count) == tuple(places.count(place) for place in ("device", "host", "disk"))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_what_fits_into_a_budget(kv_dtype: str) -> None:
    """`rows_within` against `peak_bytes` of the residency that it gives: within the budget, and close to it."""
    chance = random.Random(0)
    for _ in range(300):
        layout = small_layout(
            CONFIG, length=60 * CHUNK, kv_dtype=kv_dtype, block_chunks=chance.choice((1, 2, 4)), segment_chunks=1
        )
        used = chance.randint(30 * CHUNK, 60 * CHUNK)
        prefill_chunk_size = chance.choice((1, 5, CHUNK, 2 * CHUNK, 3 * CHUNK, 8 * CHUNK))
        budget = chance.randint(0, held_bytes(layout, used).nope)
        rows = rows_within(layout, budget, prefill_chunk_size, is_open_here=True, is_read_here=True)
        peak = peak_bytes(layout, used, prefill_chunk_size, Residency(rows))
        assert rows == 0 or peak.nope_host + peak.buffers <= budget
        more = peak_bytes(layout, used, prefill_chunk_size, Residency(rows + 1))
        if more.nope_disk:  # or everything fits
            assert more.nope_host + more.buffers + layout.open_bytes(layout.block_tokens) > budget
        assert rows_within(layout, budget, 1, is_open_here=False, is_read_here=False) == budget // layout.row_bytes


def test_one_layer_alone() -> None:
    """The layers' classes by themselves, without HybridKVCache: block 12, segment 4, chunk 4, positions as values."""
    config = replace(CONFIG, num_key_value_heads=1, head_dim=1, attention_chunk_size=4)
    layout = StoreLayout(config, 40, "float32", "float32", 1, 12, 4)
    cpu = torch.device("cpu")
    store = OffloadedKVCache(1, Tiers(layout, cpu), 40)
    window = ChunkedKVCache(empty_block(layout, 4, cpu), 4)
    for start, stop, in_window in ((0, 3, 0), (3, 4, 0), (4, 30, 4), (30, 31, 28), (31, 36, 28), (36, 40, 36)):
        new = torch.arange(start, stop, dtype=torch.float32).view(1, 1, -1, 1)
        for layer in (store, window):
            layer.append(start, new, -new)
        for segments, first in ((store.segments(1, Residency()), 0), (window.segments(), in_window)):
            positions = torch.arange(first, stop, dtype=torch.float32)
            shown = torch.cat([torch.stack((segment.keys, segment.values)) for segment in segments], 3).squeeze()
            assert torch.equal(shown, torch.stack((positions, -positions)).squeeze())
        for layer in (store, window):
            layer.settle(stop)
    assert (len(store.sealed), list(store.open), store.nbytes(on_host=True), window.nbytes) == (3, [9], 10 * 32, 32)
    assert store.nbytes(on_host=False) == 0


def test_tokens_are_taken_back_within_the_attention_chunk() -> None:
    """As many as `room` says, and none of the chunk before; what follows is as if they had never been there."""
    cache = make(length=20)
    naive = Naive.of(cache)
    step(cache, naive, 4)
    assert cache.room == CHUNK - 4 - 1
    step(cache, naive.fork(), cache.room)
    cache.rewind(4)
    step(cache, naive, 3)
    with pytest.raises(AssertionError):
        cache.rewind(6)  # the chunk has ended
    step(cache, naive, 13)
    assert cache.room == 0 == cache.length - cache.offset
