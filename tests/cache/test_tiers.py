"""Sealed blocks on disk, promoted, dropped, shared and saved: bit by bit what a cache in memory shows.

How they are read ahead is in test_reading_ahead.py.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cache.blocks import Block, empty_block
from cache.disk import Scratch, UnitFile, Units
from cache.errors import DiskFullError
from cache.grid import prefill_grid
from cache.layout import StoreLayout
from cache.packing import pack, unpack
from cache.residency import READ_BUFFERS, Residency, buffer_bytes, held_bytes, peak_bytes
from cache.sealed import SealedBlock
from cache.tiers import Tiers, stays_on_host
from support.cache_toys import CHUNK, CONFIG, LAYERS, Naive, make, pieces, random_keys_values, step, storage_bytes
from support.cached_paths import SavedRows
from support.tier_toys import BLOCK, filled, restored, same, shown, together

PAIRS = [
    ("float32", "auto"),
    ("float32", "bfloat16"),
    ("float32", "fp8"),
    ("float32", "int8"),
    ("bfloat16", "auto"),
    ("bfloat16", "float32"),
    ("bfloat16", "float16"),
    ("bfloat16", "fp8"),
    ("float16", "int8"),
]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the units that are read, in order."""
    names: list[str] = []
    original = UnitFile.read
    monkeypatch.setattr(UnitFile, "read", lambda self, name, into: (names.append(name), original(self, name, into)))
    return names


@pytest.mark.parametrize("size", [CHUNK - 2, CHUNK, 3 * CHUNK, 9 * CHUNK])
@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_the_tier_changes_no_bit(dtype: str, kv_dtype: str, size: int, rows: Scratch, tmp_path: Path) -> None:
    """Runs with 0, 1, 2 and all rows in memory side by side; each holds what the closed forms say, at every step."""
    length = 10 * CHUNK + 3
    residencies = [Residency(None), Residency(0), Residency(1), Residency(2), Residency(2)]
    stores = [None, rows, rows, rows, SavedRows(tmp_path)]
    caches = [
        make(dtype=getattr(torch, dtype), kv_dtype=kv_dtype, length=length, residency=residency, rows=store)
        for residency, store in zip(residencies, stores, strict=True)
    ]
    for positions in prefill_grid(0, length - 1, size, CHUNK, BLOCK):
        together(caches, len(positions))
        for cache in caches:
            saves_all = isinstance(cache.rows, SavedRows)
            expected = held_bytes(cache.layout, cache.offset, cache.residency, all_on_disk=saves_all)
            assert cache.held() == expected
            assert cache.held().total == expected.total == storage_bytes(cache)
    assert [cache.held().nope_disk // cache.layout.row_bytes for cache in caches] == [0, 5, 4, 3, 5]
    together(caches, 1)


@pytest.mark.parametrize("size", [1, CHUNK - 2, CHUNK, BLOCK, 3 * CHUNK, 5 * CHUNK])
@pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize("segment_chunks", [1, 2])
def test_no_step_holds_more_than_the_peak(kv_dtype: str, size: int, segment_chunks: int, rows: Scratch) -> None:
    """Not within a step either, checked after each layer's new tokens. And the peak is no more than needed."""
    for length in (10 * CHUNK + 3, 11 * CHUNK, 12 * CHUNK + 1):
        for host_rows in (None, 0, 1, 2):
            cache = make(
                kv_dtype=kv_dtype,
                segment_chunks=segment_chunks,
                length=length,
                residency=Residency(host_rows),
                rows=rows,
            )
            peak, most = peak_bytes(cache.layout, length, size, cache.residency), 0
            for positions in prefill_grid(0, length, size, CHUNK, BLOCK):
                for layer in LAYERS:
                    cache.append(layer, *random_keys_values(cache, len(positions)))
                    held = cache.held()
                    most = max(most, held.total)
                    assert held.nope_host <= peak.nope_host and held.rope_windows <= peak.rope_windows
                    assert held.total <= peak.total
                cache.advance(len(positions))
                held = cache.held()
                most = max(most, held.total)
                assert held.nope_disk <= peak.nope_disk and held.total <= peak.total and held.buffers <= peak.buffers
            slack = cache.layout.open_bytes(BLOCK) + cache.layout.row_bytes + peak.buffers
            assert most > peak.total - slack


@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_sealed_segments_are_packed_and_open_ones_are_not(dtype: str, kv_dtype: str, rows: Scratch) -> None:
    """Against an independent packing of what a naive store kept."""
    cache = make(dtype=getattr(torch, dtype), kv_dtype=kv_dtype, length=60, residency=Residency(1), rows=rows)
    kept = {layer: Block(*(torch.empty(1, 2, 0, 10, dtype=cache.dtype) for _ in range(2))) for layer in (1, 4)}
    for tokens in (5, 20, 1, CHUNK, 20):
        for layer in LAYERS:
            new = random_keys_values(cache, tokens)
            cache.append(layer, *new)
            if layer in kept:
                kept[layer] = Block(*(torch.cat(pair, 2) for pair in zip(kept[layer], new, strict=True)))
        cache.advance(tokens)
    sealed, size = cache.offset // BLOCK * BLOCK, cache.layout.segment_tokens
    assert (cache.offset, sealed) == (53, 42)
    for layer, block in kept.items():
        seen = shown(cache, layer, range(52, 53))
        assert [start for start, _, _ in seen] == list(range(0, 53, size))
        for start, *found in seen:
            expected = Block(*(x[:, :, start : start + size].contiguous() for x in block))
            if start < sealed:
                expected = unpack(
                    pack(expected, cache.layout), cache.layout, empty_block(cache.layout, size, torch.device("cpu"))
                )
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("queries", [1, 17, 10_000])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_on_the_cpu_the_number_of_queries_changes_nothing(rows: Scratch, queries: int, batch_size: int) -> None:
    cache = make(length=100, residency=Residency(1), rows=rows, batch_size=batch_size)
    together([cache], 5 * CHUNK + 1)
    expected = shown(cache, 1, range(35, 36))
    assert same(shown(cache, 1, range(queries)), expected)
    in_memory = make(length=100, batch_size=batch_size)
    together([in_memory], 5 * CHUNK + 1)
    for store in in_memory.stores:  # not even copied
        packed = [packed for block in store.sealed for packed in block.segments if packed is not None]
        stream = in_memory.tiers.stream(store.sealed, Residency(), queries)
        assert [block.keys.data_ptr() for block in stream] == [segment.keys.data_ptr() for segment in packed]
        for block in store.sealed:
            segments = block.segments
            in_memory.tiers.to_host(block)
            assert block.segments is segments and in_memory.tiers.copies_on_host(block) is segments


@pytest.mark.parametrize("offset", [1, CHUNK, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + CHUNK, 50])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_restored_cache_goes_on_as_the_one_that_was_saved(
    offset: int, kv_dtype: str, rows: Scratch, tmp_path: Path
) -> None:
    cache, saved = filled(offset, tmp_path, kv_dtype=kv_dtype, length=150, batch_size=2)
    caches = [cache, *(restored(cache, saved, count, rows=rows) for count in (None, 0, 1, 2))]
    for other in caches[1:]:  # the buffers are there before a read needs them
        assert other.held().buffers == held_bytes(other.layout, offset, other.residency, all_on_disk=True).buffers
        assert other.held().nope == other.layout.open_bytes(offset % BLOCK)
    for tokens in pieces(offset, 90):
        together(caches, tokens)
    for other in caches[1:]:
        there = held_bytes(other.layout, other.offset, other.residency).nope_disk // other.layout.row_bytes
        assert other.held().nope_disk // other.layout.row_bytes == max(there, offset // BLOCK)
        assert other.held().nope == held_bytes(other.layout, other.offset, other.residency).nope


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_a_part_of_a_block_is_enough_at_an_attention_chunk(kv_dtype: str, tmp_path: Path) -> None:
    """Only what was packed can come back from a packed block, also as the open part."""
    how = {"kv_dtype": kv_dtype, "length": 100, "block_chunks": 4, "segment_chunks": 2}
    cache, saved = filled(9 * CHUNK, tmp_path, **how)
    for offset in range(0, 8 * CHUNK + 1, CHUNK):
        number, used = divmod(offset, 4 * CHUNK)
        part = make(**how)  # type: ignore[arg-type]
        part.restore(offset, saved.reopened(number), partial=saved.reopened()[number] if used else None)
        assert part.held().nope == part.layout.open_bytes(used)  # of the others nothing has been read
        for layer in (1, 4):
            part.append(layer, *random_keys_values(part, 1))
            seen = torch.cat([keys for _, keys, _ in shown(part, layer, range(offset, offset + 1))], 2)[:, :, :offset]
            whole = torch.cat([keys for _, keys, _ in shown(cache, layer, range(62, 63))], 2)[:, :, :offset]
            assert torch.equal(seen, whole)
    with pytest.raises(AssertionError):
        make(**how).restore(CHUNK + 1, [], partial=saved.files[0])  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        make(**how).restore(4 * CHUNK, [], partial=saved.files[0])  # type: ignore[arg-type]


def test_blocks_that_fit_into_memory_stay_when_read_again(tmp_path: Path, read: list[str]) -> None:
    cache, saved = filled(4 * BLOCK + 3, tmp_path, length=150)
    other = restored(cache, saved)
    assert read == [] and other.held().nope == other.layout.open_bytes(3)
    everything = [f"{layer}.{segment}" for layer in (1, 4) for _ in range(4) for segment in range(2)]
    for times in (1, 2, 2, 2):
        together([cache, other], 1)
        assert sorted(read) == sorted(everything * times)
        assert other.held().nope == (other.layout.open_bytes(4) if times == 1 else cache.held().nope)
        assert other.held().buffers == buffer_bytes(other.layout, 4, 4)
    assert storage_bytes(other) == storage_bytes(cache) == cache.held().total


@pytest.mark.parametrize("host_rows", [1, 2])
def test_promoted_blocks_go_when_they_are_older(tmp_path: Path, read: list[str], host_rows: int) -> None:
    """Not read again while they are among the newest, then each time."""
    cache, saved = filled(4 * BLOCK, tmp_path, length=200)
    other = restored(cache, saved, host_rows, rows=saved)
    for store in other.stores:
        for block in store.sealed:
            block.was_read = True  # before
    cache.rows = None
    for tokens in (1, BLOCK - 2, 1, BLOCK, 2 * BLOCK, 1):
        on_disk = [block for block in other.stores[0].sealed if not block.is_in_memory]
        read.clear()
        together([cache, other], tokens)
        assert read.count("1.0") == read.count("4.1") == len(on_disk)
        in_memory = [[block.is_in_memory for block in store.sealed] for store in other.stores]
        sealed = other.offset // BLOCK
        assert in_memory == [[False] * (sealed - host_rows) + [True] * host_rows] * 2
        assert other.held().nope_host == held_bytes(other.layout, other.offset, Residency(host_rows)).nope_host
        assert storage_bytes(other) == other.held().total


def test_forks_share_what_is_on_disk_and_scratch(rows: Scratch) -> None:
    """The fork's rows go to the same scratch file; parent, fork and the fork's fork continue in turns."""
    caches = [make(length=170, residency=Residency(1), rows=rows), make(length=170)]
    for tokens in pieces(1, 47):
        together(caches, tokens)
    pairs = [caches, [cache.fork() for cache in caches]]
    together(pairs[1], BLOCK)
    pairs.append([cache.fork() for cache in pairs[1]])
    for seed in range(3):
        for pair in pairs:
            for tokens in pieces(seed, 20):
                together([pair[1], pair[0]], tokens)
    for on_disk, _ in pairs:
        sealed = on_disk.offset // BLOCK
        assert on_disk.held().nope_disk == (sealed - 1) * on_disk.layout.row_bytes
        assert on_disk.tiers is caches[0].tiers  # and its buffers
    first = [[block for store in pair[0].stores for block in store.sealed[:3]] for pair in pairs]
    assert first[0] == first[1] == first[2]


def test_durable_stores_get_each_row_once_in_order(tmp_path: Path) -> None:
    """As soon as it is sealed, wherever it lies; nothing that forks read; nothing that was restored."""
    cache, saved = filled(3 * BLOCK + 2, tmp_path, length=250)
    assert saved.written == [0, 1, 2]
    fork = cache.fork()
    together([fork], 4 * BLOCK)
    together([fork.fork()], BLOCK)
    assert saved.written == [0, 1, 2] and fork.rows is None
    assert fork.held().nope == held_bytes(fork.layout, fork.offset).nope  # nowhere else to put them
    other = restored(cache, saved, 1, rows=saved)
    for tokens in pieces(3, 100):
        together([other], tokens)
        assert saved.written == list(range(other.offset // BLOCK))
    for row, file in enumerate(saved.reopened()):
        assert list(file.units) == ["1.0", "1.1", "4.0", "4.1"] and file.metadata == {"block": str(row)}
        assert file.verify() == other.layout.row_bytes


class Failing(SavedRows):
    """Has no space for its `number`-th write and some after that: nothing of them is kept."""

    def __init__(self, folder: Path, number: int, times: int, *, is_durable: bool) -> None:
        super().__init__(folder)
        self.is_durable = is_durable
        self.tries = range(number, number + times)
        self.tried = -1

    def write(self, row: int, units: Units) -> UnitFile:
        self.tried += 1
        if self.tried in self.tries:
            raise DiskFullError(f"{self.folder}: no room")
        return super().write(row, units)


@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("is_durable", [True, False])
def test_no_room_for_a_row(tmp_path: Path, number: int, times: int, is_durable: bool) -> None:
    """The tokens are committed, the cache is right, and the next step tries again."""
    saved = Failing(tmp_path, number, times, is_durable=is_durable)
    cache = make(length=200, residency=Residency(1), rows=saved)
    naive, failures = Naive.of(cache), 0
    for tokens in (*pieces(7, 100), BLOCK, 1, 1, 1):
        before = cache.offset
        try:
            step(cache, naive, tokens)
        except DiskFullError:
            failures += 1
        assert cache.offset == before + tokens and saved.written == list(range(len(saved.written)))
        if is_durable:
            step(cache.fork(), naive.fork(), tokens)
    assert failures == times
    sealed = cache.offset // BLOCK
    assert saved.written == list(range(sealed if is_durable else sealed - 1))
    assert cache.held().nope == held_bytes(cache.layout, cache.offset, Residency(1)).nope


def test_without_a_disk_nothing_is_lost() -> None:
    """Rows that should be on disk stay in memory where there is no store."""
    cache, straight = make(length=100, residency=Residency(0)), make(length=100)
    for tokens in pieces(5, 80):
        together([straight, cache], tokens)
    assert cache.held().nope == straight.held().nope and cache.held().nope_disk == 0


def test_the_only_copy_is_not_dropped() -> None:
    layout = make().layout
    block = Tiers(layout, torch.device("cpu")).seal(1, [empty_block(layout, CHUNK, torch.device("cpu"))] * 2)
    with pytest.raises(AssertionError, match="the only copy"):
        block.drop_from_memory()
    assert block.is_in_memory and block.nbytes(on_host=True) == 2 * layout.segment_bytes
    assert block.nbytes(on_host=False) == 0 and not SealedBlock(1, [None, None]).is_in_memory


def test_a_run_that_seals_nothing_needs_no_buffers(rows: Scratch) -> None:
    cache = make(length=BLOCK, kv_dtype="int8", residency=Residency(0), rows=rows)
    together([cache], BLOCK - 1)
    assert cache.held().buffers == cache.held().nope_disk == 0
    together([cache], 1)
    expected = READ_BUFFERS * cache.layout.sealed_segment_bytes + cache.layout.segment_bytes
    assert cache.held().buffers == expected and cache.held().nope == 0


def test_order_does_not_depend_on_what_is_in_memory(tmp_path: Path) -> None:
    """Any blocks in memory, any on disk, each more than once: the segments come in order all the same."""
    cache, saved = filled(6 * BLOCK, tmp_path, length=100, kv_dtype="float16")
    expected = shown(cache, 4, range(1))
    chance = random.Random(0)
    for _ in range(40):
        for block in cache.stores[1].sealed:
            if chance.random() < 0.5:
                block.drop_from_memory()
        cache.residency = Residency(chance.randrange(7))
        assert same(shown(cache, 4, range(1)), expected)
    assert saved.written == list(range(6))


@pytest.mark.parametrize(("kv_dtype", "most"), [("auto", 12), ("fp8", 6), ("int8", 6)])
def test_queries_travel_while_that_moves_fewer_bytes(kv_dtype: str, most: int) -> None:
    """With Scout's shape: a token with its draft to keys and values in bfloat16, half as many to smaller ones."""
    shape = {"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192}
    layout = StoreLayout.of(replace(CONFIG, **shape), length=10**6, dtype="bfloat16", kv_dtype=kv_dtype)
    assert [n for n in range(1, 100) if stays_on_host(layout, n)] == list(range(1, most + 1))
