"""Blocks that move between an accelerator and the host: when copies are done changes nothing, and waits are needed."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from cache.blocks import empty_block
from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.packing import pack
from cache.residency import RING_BUFFERS, Residency, device_rows_within, held_bytes, peak_bytes
from cache.sealed import SealedBlock
from support.cache_toys import CHUNK, CONFIG, LAYERS, make, pieces, random_keys_values
from support.cached_paths import SavedRows
from support.tier_toys import BLOCK, filled, shown, together
from support.transports import UnrulyTransport

CPU = torch.device("cpu")
MANY = range(10_000)  # queries: segments travel to them


def accelerated(
    seed: int,
    *,
    device_rows: int = 0,
    host_rows: int | None = None,
    rows: Scratch | SavedRows | None = None,
    kv_dtype: str = "auto",
) -> HybridKVCache:
    like = make(kv_dtype=kv_dtype, length=200)
    residency = Residency(host_rows, device_rows, on_accelerator=True)
    return HybridKVCache(
        CONFIG, length=200, layout=like.layout, residency=residency, rows=rows, transport=UnrulyTransport(seed)
    )


def read_together(caches: list[HybridKVCache], seed: int, tokens: int) -> None:
    for count in pieces(seed, tokens):
        together(caches, count)
        for layer in (1, 4):  # as many queries as there is compute for
            expected = shown(caches[0], layer, MANY)
            for cache in caches[1:]:
                found = shown(cache, layer, MANY)
                assert len(found) == len(expected)
                for a, b in zip(found, expected, strict=True):
                    assert a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


@pytest.mark.parametrize(("kv_dtype", "seed"), [("auto", 0), ("auto", 1), ("bfloat16", 2), ("int8", 3)])
def test_the_order_of_copies_changes_nothing(rows: Scratch, kv_dtype: str, seed: int) -> None:
    """Blocks on the device, in host memory and on disk, read by few queries and by many."""
    caches = [
        make(kv_dtype=kv_dtype, length=200),
        accelerated(seed, kv_dtype=kv_dtype),
        accelerated(seed, kv_dtype=kv_dtype, device_rows=1),
        accelerated(seed, kv_dtype=kv_dtype, device_rows=1, host_rows=1, rows=rows),
        accelerated(seed, kv_dtype=kv_dtype, host_rows=0, rows=rows),
        accelerated(seed, kv_dtype=kv_dtype, device_rows=99),
    ]
    read_together(caches, seed, 6 * BLOCK + 3)
    forks = [cache.fork() for cache in caches]
    read_together(forks, seed, BLOCK)
    read_together(caches, seed, BLOCK)


@pytest.mark.parametrize("seed", range(2))
def test_streams_can_be_abandoned(rows: Scratch, seed: int) -> None:
    caches = [make(length=200), accelerated(seed, host_rows=1, rows=rows), accelerated(seed)]
    read_together(caches, seed, 5 * BLOCK)
    for many in range(5):
        for cache in caches:
            segments = cache.segments(4, MANY)
            for _ in range(many):
                next(segments)
            if many % 2:
                segments.close()  # type: ignore[attr-defined]
            else:
                del segments
        read_together(caches, seed, 1)


@pytest.mark.parametrize("seed", range(2))
def test_restored_blocks_go_to_the_device(tmp_path: Path, seed: int) -> None:
    """Those for which it has room, once they have been read twice."""
    cache, saved = filled(4 * BLOCK + 3, tmp_path, length=200)
    other = accelerated(seed, device_rows=2)
    other.restore(cache.offset, saved.reopened(4), tail=cache.tail())
    cache.rows = None
    for _ in range(4):
        read_together([cache, other], seed, 1)
    assert [block.is_on_device for block in other.stores[0].sealed] == [False, False, True, True]
    assert other.held() == held_bytes(other.layout, other.offset, other.residency, all_on_disk=True)


@pytest.mark.parametrize("host_rows", [None, 0, 1])
@pytest.mark.parametrize("device_rows", [0, 1, 2, 99])
@pytest.mark.parametrize("size", [CHUNK, 3 * CHUNK])
def test_it_holds_what_the_closed_forms_say(rows: Scratch, host_rows: int | None, device_rows: int, size: int) -> None:
    cache = accelerated(0, device_rows=device_rows, host_rows=host_rows, rows=rows)
    peak = peak_bytes(cache.layout, 9 * CHUNK, size, cache.residency)
    for _ in range(9 * CHUNK // size):
        for layer in LAYERS:
            cache.append(layer, *random_keys_values(cache, size))
            held = cache.held()
            assert held.nope_device <= peak.nope_device and held.nope_host <= peak.nope_host
        cache.advance(size)
        assert cache.held() == held_bytes(cache.layout, cache.offset, cache.residency)
    end = cache.held()
    assert end.nope_device <= peak.nope_device <= end.nope_device + 4 * cache.layout.row_bytes


def test_what_fits_on_the_device() -> None:
    """All rows without a ring, or fewer beside it; never more than the budget at the peak."""
    layout = make(length=9 * BLOCK).layout
    rows, found = layout.sealed_rows(9 * BLOCK), []
    for budget in range(0, 14 * layout.row_bytes, layout.row_bytes // 3):
        device_rows = device_rows_within(layout, budget, CHUNK, rows)
        found.append(device_rows)
        peak = peak_bytes(layout, 9 * BLOCK, CHUNK, Residency(None, device_rows, True)).nope_device
        assert peak <= budget or device_rows == 0
    assert found == sorted(found) and found[0] == 0 and found[-1] == rows
    without = held_bytes(layout, 9 * BLOCK, Residency(None, rows, True)).nope_device
    ring = held_bytes(layout, 9 * BLOCK, Residency(None, rows - 1, True)).nope_device
    assert ring - without == RING_BUFFERS * layout.sealed_segment_bytes - layout.row_bytes


@contextlib.contextmanager
def interrupted_within_move(instruction: int) -> Iterator[None]:
    """Ctrl-C before this instruction, counted from 1."""
    count, code = 0, SealedBlock.move.__code__

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        if event == "opcode" and count == instruction:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_ctrl_c_within_a_move() -> None:
    """At any instruction: the block is where it was, or where it goes to. Some of both would be read as garbage."""
    layout = make(length=BLOCK).layout
    on_device, on_host = ([pack(empty_block(layout, CHUNK, CPU), layout)] * 2 for _ in range(2))
    found = []
    for instruction in itertools.count(1):
        block = SealedBlock(1, on_device, is_on_device=True)
        try:
            with interrupted_within_move(instruction):
                block.move(on_host, arrived=(7,))
        except KeyboardInterrupt:
            has_moved = block.segments[0] is on_host[0]
            assert (block.is_on_device, block.arrived) == ((False, (7,)) if has_moved else (True, ()))
            found.append(has_moved)
            continue
        break
    assert found == sorted(found) and set(found) == {False, True}


@pytest.mark.parametrize("missing", ["wait", "finish", "after"])
def test_a_missing_wait_is_noticed(rows: Scratch, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """The control: without any one kind of wait these tests fail."""
    caches = [make(length=200), *(accelerated(seed, host_rows=1, rows=rows) for seed in range(2))]
    if missing == "after":
        original = UnrulyTransport.send
        monkeypatch.setattr(UnrulyTransport, "send", lambda self, copies, *after: original(self, copies))
    else:
        monkeypatch.setattr(UnrulyTransport, missing, lambda self, event: None)
    with pytest.raises(AssertionError):
        read_together(caches, 0, 6 * BLOCK)
