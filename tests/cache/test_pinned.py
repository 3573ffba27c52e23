"""Pinned memory that is taken once: how much, that no step takes more, and that a slot is not used too early."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cache import pinned, residency
from cache.context import ContextKVCache
from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.pinned import PinnedTransport
from cache.residency import (
    Residency,
    held_bytes,
    peak_bytes,
    pinned_bytes,
    pinned_rows_within,
    pinned_slots,
    slot_bytes,
)
from model.context_division import ContextRank
from support.cache_toys import CHUNK, CONFIG, LAYERS, make, random_keys_values
from support.cached_paths import SavedRows
from support.tier_toys import BLOCK, filled, shown, together
from support.transports import PinningTransport

MANY = range(10_000)  # queries: segments travel to them
NOPE = 2  # layers
PASSING = 3 + 2 + 3 + 2  # read buffers, and a block of two segments, what is read ahead of it, and what threads hold


def accelerated(
    transport: PinningTransport,
    *,
    device_rows: int = 0,
    host_rows: int | None = None,
    rows: Scratch | SavedRows | None = None,
    kv_dtype: str = "auto",
    length: int = 200,
) -> HybridKVCache:
    return HybridKVCache(
        CONFIG,
        length=length,
        layout=make(kv_dtype=kv_dtype, length=length).layout,
        residency=Residency(host_rows, device_rows, on_accelerator=True),
        rows=rows,
        transport=transport,
    )


def read(cache: HybridKVCache, tokens: int) -> None:
    """Attended by few queries, on the host, and by many."""
    for start in range(0, tokens, CHUNK):
        together([cache], min(CHUNK, tokens - start))
        for layer in (1, 4):
            shown(cache, layer, MANY)


def in_all(cache: HybridKVCache) -> tuple[int, int]:
    held = cache.held()
    return held.nope_host + held.buffers, held.pinned


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize(("device_rows", "host_rows"), [(0, None), (1, None), (1, 1), (0, 0), (99, None)])
def test_no_step_takes_pinned_memory(rows: Scratch, kv_dtype: str, device_rows: int, host_rows: int | None) -> None:
    """And at every step as much is held as the closed form says for the end."""
    transport = PinningTransport(1)
    cache = accelerated(transport, device_rows=device_rows, host_rows=host_rows, rows=rows, kv_dtype=kv_dtype)
    tokens = 5 * BLOCK + 3
    assert cache.pin(tokens) == 0
    slots = pinned_slots(cache.layout, tokens, cache.residency, NOPE)
    asked = list(transport.asked)
    unpacked = cache.layout.segment_bytes if cache.layout.is_packed else 0
    assert cache.held().pinned == pinned_bytes(slots, slot_bytes(cache.layout)) >= sum(asked)
    for _ in range(5):
        read(cache, BLOCK)
        held = cache.held()
        assert held.nope_host + held.buffers == held.pinned + unpacked
    read(cache, 3)
    assert transport.asked == asked and transport.outside == 0
    end = held_bytes(cache.layout, tokens, cache.residency, slots=slots)
    held = cache.held()
    assert (held.nope_host, held.nope_disk, held.pinned) == (end.nope_host, end.nope_disk, end.pinned)
    assert held.buffers == end.buffers
    peak = peak_bytes(cache.layout, tokens, CHUNK, cache.residency, slots=slots)
    assert (peak.nope_host + peak.buffers, peak.pinned) == (end.nope_host + end.buffers, end.pinned)


def test_a_longer_run_takes_more_and_a_shorter_one_nothing() -> None:
    transport = PinningTransport(2)
    cache = accelerated(transport)
    cache.pin(2 * BLOCK)
    first = sum(transport.asked)
    cache.pin(BLOCK)
    assert sum(transport.asked) == first == 2 * NOPE * 2 * slot_bytes(cache.layout)
    read(cache, 2 * BLOCK)
    cache.pin(3 * BLOCK)
    assert sum(transport.asked) == first * 3 // 2
    read(cache, BLOCK)
    assert transport.outside == 0
    read(cache, BLOCK)  # beyond what was asked for: as it comes
    assert transport.outside > 0 and cache.held().nope_host == 4 * cache.layout.row_bytes


def test_without_an_accelerator_nothing_is_pinned(rows: Scratch) -> None:
    cache = make(length=200, residency=Residency(1), rows=rows)
    assert cache.pin(100, all_on_disk=True) == 0 and in_all(cache) == (0, 0)
    rank = ContextRank(0, 2)
    context = ContextKVCache(make(length=rank.own_length(200, CHUNK)), rank, 200)
    assert context.pin(200) == 0 and context.held().pinned == 0


def test_a_context_rank_pins_its_own_part() -> None:
    transport, rank = PinningTransport(3), ContextRank(1, 2)
    own = accelerated(transport, length=rank.own_length(200, CHUNK))
    cache = ContextKVCache(own, rank, 200)
    tokens = 9 * BLOCK + CHUNK
    cache.pin(tokens)
    rows = rank.tokens_before(tokens, CHUNK) // BLOCK
    assert 0 < rows < 9
    assert sum(transport.asked) == rows * NOPE * 2 * slot_bytes(own.layout) <= cache.held().pinned


def test_what_the_system_does_not_pin_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "SLAB_BYTES", 2**14)
    size = slot_bytes(make(length=200).layout)
    slabs = list(residency.slab_slots(5 * NOPE * 2, size))
    assert len(slabs) > 2
    transport = PinningTransport(4, most=slabs[0] * size)
    caches = [make(length=200), accelerated(transport)]
    refused = caches[1].pin(5 * BLOCK)
    assert refused == sum(residency.slab_bytes(count * size) for count in slabs[1:])
    assert len(transport.asked) == 2  # it is not asked again
    for _ in range(10):
        together(caches, CHUNK)
        for layer in (1, 4):
            assert_same(caches, layer)
    assert transport.outside == 0 and caches[1].pin(5 * BLOCK) == refused


def assert_same(caches: list[HybridKVCache], layer: int) -> None:
    expected = shown(caches[0], layer, MANY)
    for cache in caches[1:]:
        for a, b in zip(shown(cache, layer, MANY), expected, strict=True):
            assert a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


def churn(seed: int, rows: Scratch, monkeypatch: pytest.MonkeyPatch) -> PinningTransport:
    """Forks that go on and are forgotten, as where a conversation is undone, in all tiers: all show what a cache in
    memory does, and in the end every slot but those of the first cache's blocks and buffers is free."""
    transport, chance = PinningTransport(seed), random.Random(seed)
    transport.slot_bytes = slot_bytes(make(length=200).layout)
    monkeypatch.setattr(pinned, "_give_back", transport.give_back)
    caches = [make(length=200), accelerated(transport, device_rows=seed % 2, host_rows=2, rows=rows)]
    caches[1].pin(6 * BLOCK)
    for _ in range(3):
        for _ in range(3):
            together(caches, chance.choice((CHUNK, BLOCK)))
            assert_same(caches, chance.choice((1, 4)))
        forks = [cache.fork() for cache in caches]
        for _ in range(2):
            together(forks, BLOCK)
            assert_same(forks, 4)
        del forks
        assert_same(caches, 1)
    slots = caches[1].tiers.transport
    assert slots is not None
    blocks = sum(block.nbytes(on_host=True) for store in caches[1].stores for block in store.sealed)
    assert slots.slots_in_use <= blocks // caches[1].layout.sealed_segment_bytes + residency.READ_BUFFERS
    return transport


@pytest.mark.parametrize("seed", range(4))
def test_slots_are_used_again_and_none_too_early(seed: int, rows: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert churn(seed, rows, monkeypatch).poisoned > 10


def test_a_missing_wait_for_a_slot_is_noticed(rows: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where copies of a slot do not wait for one another."""
    monkeypatch.setattr(PinnedTransport, "send", lambda self, copies, *after: self._transport.send(copies, *after))
    failed = 0
    for seed in range(8):
        try:
            churn(seed, rows, monkeypatch)
        except AssertionError:
            failed += 1
    assert failed > 0


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_context_saved_from_slots_is_equal(tmp_path: Path, kv_dtype: str) -> None:
    stores = [SavedRows(tmp_path / name) for name in ("a", "b")]
    for store in stores:
        store.folder.mkdir()
    transport = PinningTransport(5)
    caches = [make(length=200, rows=stores[0], kv_dtype=kv_dtype)]
    caches.append(accelerated(transport, rows=stores[1], kv_dtype=kv_dtype))
    caches[1].pin(4 * BLOCK, all_on_disk=True)
    asked = sum(transport.asked)
    assert asked == (4 * NOPE * 2 + PASSING) * slot_bytes(caches[1].layout)
    for _ in range(4):
        together(caches, BLOCK)
    files = [sorted(path.read_bytes() for path in store.folder.iterdir()) for store in stores]
    assert files[0] == files[1] and len(files[0]) == 4
    assert sum(transport.asked) == asked and transport.outside == 0
    slots = pinned_slots(caches[1].layout, 4 * BLOCK, caches[1].residency, NOPE, all_on_disk=True)
    expected = held_bytes(caches[1].layout, 4 * BLOCK, caches[1].residency, all_on_disk=True, slots=slots)
    assert caches[1].held().pinned == expected.pinned and caches[1].held().nope_host == expected.nope_host


def test_restored_blocks_pass_through_the_slots_of_one_row(tmp_path: Path) -> None:
    """On their way to the device, for which they are read in the second step; none is left in host memory."""
    cache, saved = filled(5 * BLOCK + 3, tmp_path, length=200)
    transport = PinningTransport(6)
    other = accelerated(transport, device_rows=5)
    other.pin(cache.offset, all_on_disk=True)
    other.restore(cache.offset, saved.reopened(5), tail=cache.tail())
    cache.rows = None
    for _ in range(3):
        new = random_keys_values(cache, 1)
        for layer in LAYERS:
            for each in (cache, other):
                each.append(layer, *new)
            if layer in (1, 4):
                assert_same([cache, other], layer)
        for each in (cache, other):
            each.advance(1)
    assert all(block.is_on_device for store in other.stores for block in store.sealed)
    assert transport.outside == 0 and other.held().nope_host == 0


def test_rows_within_a_budget() -> None:
    """As many as fit beside what files are read and written through, and not one more."""
    layout = make(length=200, kv_dtype="int8").layout
    size = slot_bytes(layout)

    def needed(rows: int) -> int:
        slots = rows * NOPE * 2 + PASSING
        return pinned_bytes(slots, size) + layout.segment_bytes

    for budget in range(0, 40 * layout.row_bytes, layout.row_bytes // 2):
        rows = pinned_rows_within(layout, budget)
        assert (rows == 0 or needed(rows) <= budget) and needed(rows + 1) > budget


@pytest.mark.parametrize("size", [2**25, 16 * 2**20 + 3 * 2**18, 2**28, 2**28 + 64])
def test_slabs_hold_all_slots_and_waste_little(size: int) -> None:
    """Torch rounds pinned memory up to powers of two, each by itself."""
    for slots in (1, 2, 7, 8, 100, 1537):
        slabs = list(residency.slab_slots(slots, size))
        assert sum(slabs) == slots and all(count * size <= max(2**28, 2 * size) for count in slabs)
        taken = sum(2 ** (count * size - 1).bit_length() for count in slabs)
        assert taken == pinned_bytes(slots, size)
        if size in (2**25, 2**28):
            assert taken == slots * size
        elif size < 2**28:
            assert taken <= slots * size * 1.03 + 2**28
