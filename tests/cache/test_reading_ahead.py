"""Segments on disk are read in the background, a few ahead, into the same buffers; errors come out in the consumer."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.disk import UnitFile
from cache.errors import DiskError
from cache.hybrid import HybridKVCache
from cache.residency import READ_BUFFERS, Residency, buffer_bytes, held_bytes
from model.kernels.attend import KVSegment
from model.weights.read_ahead import ahead, as_bytes
from support.cache_toys import CONFIG, LAYERS, make, random_keys_values, storage_bytes
from support.tier_toys import BLOCK, filled, restored, same, shown, together

ROWS = 5
UNITS = [f"1.{segment}" for _ in range(ROWS) for segment in range(2)]
SECONDS = 20  # until something that should have happened is taken not to happen


class Disk:
    """Replaces UnitFile.read: records what is read; blocks all reads, or that of `held`, while `gate` is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.held: tuple[int, str] | None = None  # row and unit
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.buffers: list[int] = []
        self.threads: set[int] = set()
        self._original = UnitFile.read

    def __get__(self, file: UnitFile, owner: type) -> Callable[[str, memoryview], None]:
        def read(name: str, into: memoryview) -> None:
            self.buffers.append(torch.frombuffer(into, dtype=torch.uint8).data_ptr())
            self.threads.add(threading.get_ident())
            self.begun.append(name)
            if self.held is None or self.held == (int(Path(str(file.source)).name), name):
                assert self.gate.wait(SECONDS)
            self._original(file, name, into)
            self.ended.append(name)

        return read

    def until(self, reads: list[str], count: int) -> None:
        """Waits for so many of `begun` or `ended`, and a little for more."""
        stop = time.monotonic() + SECONDS
        while len(reads) < count and time.monotonic() < stop:
            time.sleep(0.001)
        time.sleep(0.02)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    replaced = Disk()
    monkeypatch.setattr(UnitFile, "read", replaced)
    yield replaced
    replaced.gate.set()


@pytest.fixture(params=["auto", "int8"])
def caches(request: pytest.FixtureRequest, tmp_path: Path, disk: Disk) -> tuple[HybridKVCache, HybridKVCache]:
    """The same tokens in memory and on disk."""
    torch.manual_seed(0)
    cache, saved = filled(ROWS * BLOCK + 3, tmp_path, kv_dtype=request.param, length=200)
    other = restored(cache, saved, 0, rows=saved)
    cache.rows = None
    return cache, other


def stream(cache: HybridKVCache) -> Iterator[KVSegment]:
    store = cache.stores[0]
    return cache.tiers.stream(store.sealed, cache.residency, 1)


def right(caches: tuple[HybridKVCache, HybridKVCache]) -> bool:
    return all(same(*(shown(cache, layer, range(1)) for cache in caches)) for layer in (1, 4))


def test_the_next_segments_are_read_while_one_is_used(caches: tuple[HybridKVCache, HybridKVCache], disk: Disk) -> None:
    """As many as there are buffers, never more; in the background; into the same few buffers."""
    segments = stream(caches[1])
    assert disk.begun == []
    for number in range(len(UNITS)):
        next(segments)
        known = min(number + READ_BUFFERS, len(UNITS))
        disk.until(disk.begun, known)
        assert sorted(disk.begun) == sorted(UNITS[:known])
    assert next(segments, None) is None
    assert len(set(disk.buffers)) == READ_BUFFERS and threading.get_ident() not in disk.threads
    for _ in range(3):
        assert right(caches)
        together([caches[0].fork(), caches[1].fork()], 1)
    assert len(set(disk.buffers)) == READ_BUFFERS  # for every layer and fork
    assert caches[1].held().buffers == buffer_bytes(caches[1].layout, 1, 1)
    assert storage_bytes(caches[1]) == caches[1].held().total


def test_a_slow_disk_holds_nobody_up_before_it_must(caches: tuple[HybridKVCache, HybridKVCache], disk: Disk) -> None:
    """A segment is yielded while reads of those behind it are in flight; the next one waits for its own."""
    segments = stream(caches[1])
    first = next(segments)
    disk.until(disk.ended, READ_BUFFERS)
    kept = first.plain.keys.clone()
    disk.gate.clear()
    next(segments)  # was there already
    disk.until(disk.begun, READ_BUFFERS + 1)
    assert len(disk.ended) == READ_BUFFERS and len(disk.begun) == READ_BUFFERS + 1
    for _ in range(READ_BUFFERS - 2):
        next(segments)
    threading.Timer(0.1, disk.gate.set).start()
    next(segments)
    assert disk.gate.is_set()
    assert torch.equal(next(stream(caches[1])).plain.keys, kept) and right(caches)


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 9, 10])
def test_a_stream_that_is_abandoned(caches: tuple[HybridKVCache, HybridKVCache], disk: Disk, taken: int) -> None:
    """Its reads may still be in flight when the next begins: they do not write into what that one yields."""
    for close in (True, False):
        given_up = stream(caches[1])
        for _ in range(taken):
            next(given_up)
        disk.gate.clear()
        if close:
            given_up.close()  # type: ignore[attr-defined]
        threading.Timer(0.05, disk.gate.set).start()
        assert right(caches)
        disk.gate.set()
        assert not caches[1].tiers._pending  # they would keep alive what was read
    together(caches, BLOCK + 1)


def read_before(cache: HybridKVCache) -> None:
    """What was read once stays in memory the next time."""
    for store in cache.stores:
        for block in store.sealed:
            block.was_read = True


def test_a_block_that_was_promoted_in_part_is_dropped_whole(
    caches: tuple[HybridKVCache, HybridKVCache], disk: Disk
) -> None:
    """A stream was abandoned when the first of its segments was there; then the block is no longer among the newest."""
    _, other = caches
    other.residency = Residency(1)
    read_before(other)
    first_kept = 2 * (ROWS - 1)
    segments = stream(other)
    for _ in range(first_kept + 2 - READ_BUFFERS):
        next(segments)
    disk.until(disk.begun, first_kept + 1)
    assert other.tiers._pending[-1].exception(SECONDS) is None
    block = other.stores[0].sealed[-1]
    assert [packed is not None for packed in block.segments] == [True, False]
    for layer in LAYERS:
        other.append(layer, *random_keys_values(other, BLOCK))  # nothing attends, as in the last layer of a prefill
    other.advance(BLOCK)
    assert not block.is_in_memory
    assert other.held().nope == held_bytes(other.layout, other.offset, Residency(1)).nope


@pytest.mark.parametrize("number", [0, 4, len(UNITS) - 1])
def test_ctrl_c_while_waiting_for_a_read(
    caches: tuple[HybridKVCache, HybridKVCache], disk: Disk, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it mostly comes with a slow disk. The read continues, and what comes next must not get its buffer."""

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    waiting = iter(caches[1].segments(4, range(1)))
    disk.held = number // 2, f"4.{number % 2}"
    disk.gate.clear()
    for _ in range(number):
        next(waiting)
    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(waiting)
    expected = [(s.start, s.keys.clone()) for s in caches[0].segments(1, range(1))]
    threading.Timer(0.1, disk.gate.set).start()
    for segment, (start, keys) in zip(caches[1].segments(1, range(1)), expected, strict=True):
        if start == 0:  # attention takes its time
            assert disk.gate.wait(SECONDS)
            time.sleep(0.05)
        assert torch.equal(segment.keys, keys), start
    assert right(caches)


@pytest.mark.parametrize("wrong", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("host_rows", [0, 2, None])
def test_a_read_error_comes_out_where_the_segment_would(
    caches: tuple[HybridKVCache, HybridKVCache], wrong: int, host_rows: int | None, disk: Disk
) -> None:
    """Those before it are right; the same cache, once the file is as it was, too."""
    cache, (_, other) = caches[0], caches
    other.residency = Residency(host_rows)
    file = other.stores[0].sealed[wrong // 2].file
    assert file is not None and isinstance(file.source, Path)
    raw = file.source.read_bytes()
    place = raw.index(bytes(as_bytes(packed_values(cache, wrong))))
    expected = shown(cache, 1, range(1))
    for damage in (raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :], raw[: place + 1], None):
        for block in other.stores[0].sealed:
            block.drop_from_memory()
        file._verified.clear()
        file.source.unlink()
        if damage is not None:
            file.source.write_bytes(damage)
        seen, message = until_error(other)
        assert re.match(rf"{file.source}: (damaged: the checksum of 1\.{wrong % 2}|cut short: 1\.|missing)", message)
        assert same(seen, expected[: len(seen)]) and len(seen) <= wrong
        assert len(seen) == wrong or damage is None or len(damage) < len(raw)  # else one segment is spoilt, no other
        file.source.write_bytes(raw)
        assert right(caches)
    together(caches, BLOCK)


def packed_values(cache: HybridKVCache, number: int) -> torch.Tensor:
    packed = cache.stores[0].sealed[number // 2].segments[number % 2]
    assert packed is not None
    return packed.values.contiguous()


def until_error(cache: HybridKVCache) -> tuple[list[tuple[int, torch.Tensor, torch.Tensor]], str]:
    """What comes before the error, and its message."""
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    copies = (
        (segment.start, segment.keys.clone(), segment.values.clone())
        for segment in (s.plain for s in cache.segments(1, range(1)))
    )
    with pytest.raises(DiskError) as caught:
        seen.extend(copies)
    return seen, str(caught.value)


def test_a_missing_file_stops_the_forward(caches: tuple[HybridKVCache, HybridKVCache]) -> None:
    """Before anything is committed; and the step can be repeated."""
    _, other = caches
    file = other.stores[1].sealed[2].file
    assert file is not None and isinstance(file.source, Path)
    hidden = file.source.with_name("hidden")
    file.source.rename(hidden)
    before = other.offset
    fork = other.fork()
    with pytest.raises(DiskError, match="missing"):
        together([fork], BLOCK)
    assert fork.offset == other.offset == before
    hidden.rename(file.source)
    together([caches[0].fork(), fork], BLOCK)
    assert right(caches)


def test_a_restored_part_that_is_damaged(tmp_path: Path) -> None:
    cache, saved = filled(2 * BLOCK, tmp_path, length=100)
    os.truncate(saved.folder / "000001", 200)
    other = HybridKVCache(CONFIG, length=100, layout=cache.layout)
    with pytest.raises(DiskError, match="000001"):
        other.restore(BLOCK + BLOCK // 2, saved.reopened(1), partial=saved.reopened()[1])
    assert other.offset == 0


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_ahead_is_in_order_and_so_many_items_ahead(count: int, depth: int) -> None:
    events: list[str] = []

    def source() -> Iterator[int]:
        for item in range(count):
            events.append(f"take {item}")
            yield item

    loaded = ahead(source(), lambda item: events.append(f"load {item}") or item * 10, depth)
    assert events == []  # nothing is begun before it is asked for
    for number, item in enumerate(loaded):
        assert item == number * 10
        known = min(number + depth + 1, count)  # this one and the next ones, no more
        assert events == [f"{what} {i}" for i in range(known) for what in ("take", "load")]
    assert len(events) == 2 * count


def test_ahead_hands_an_error_on_before_it_would_be_used() -> None:
    def load(item: int) -> int:
        if item == 2:
            raise OSError("disk")
        return item

    loaded = ahead(range(4), load)
    assert next(loaded) == 0
    with pytest.raises(OSError, match="disk"):
        next(loaded)  # 1 is here, but 2, which is begun first, fails


def test_what_is_in_memory_starts_no_thread() -> None:
    cache = make(length=100)
    together([cache], 3 * BLOCK)
    assert len(shown(cache, 1, range(1))) == 6 and cache.tiers._readers is None
