"""Saved contexts: answers equal those of a run without one, whatever was saved, resumed, changed or read in between."""

from __future__ import annotations

import errno
import os
import random
import threading
import zlib
from array import array
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cache.disk
from cache.errors import DiskFullError
from cache.hybrid import HybridKVCache
from cache.layout import KV_DTYPES
from cache.residency import Residency
from l4ctx.contexts.journal import Journal
from l4ctx.contexts.reader import Context, ContextReader
from l4ctx.contexts.reuse import common_prefix
from l4ctx.contexts.writer import ContextWriter
from l4ctx.engine.prefill import as_batch
from l4ctx.errors import ContextError
from support.context_toys import (
    BLOCK,
    CHUNK,
    CONFIG,
    IN_MEMORY,
    QUESTION,
    Kind,
    answer,
    answer_of,
    block_digests,
    block_files,
    changed,
    close,
    files,
    fresh_answer,
    journal_types,
    keep,
    logits,
    model,
    reading,
    spans,
    tokens,
)

IDS = tokens(6 * BLOCK + CHUNK + 7)  # six blocks, a whole chunk and a part of one behind them
KINDS = [Kind(kv_dtype, dtype) for dtype in ("float32", "bfloat16", "float16") for kv_dtype in KV_DTYPES]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit."""
    return torch.equal(a, b)


@pytest.fixture(autouse=True)
def _fsync_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_context_kill.py checks that it is called where it must be."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "context"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.kv_dtype} of {kind.dtype}")
def test_an_answer_is_that_of_a_run_without_a_context(folder: Path, kind: Kind) -> None:
    """Bit by bit, in whatever tier blocks lie while reading and while answering."""
    assert keep(folder, IDS, kind, residency=Residency(2)) == 0
    for residency in (IN_MEMORY, Residency(0), Residency(3)):
        assert same(answer(folder, kind, residency=residency), fresh_answer(IDS, kind))


def test_an_answer_is_that_of_a_plain_forward(folder: Path) -> None:
    keep(folder, IDS)
    assert close(answer(folder), model()(as_batch(IDS + QUESTION, torch.device("cpu")))[:, len(IDS) :])


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + CHUNK])
def test_documents_of_all_lengths(folder: Path, count: int) -> None:
    ids = IDS[:count]
    assert keep(folder, ids) == 0
    assert same(answer(folder), fresh_answer(ids))
    assert keep(folder, ids) == count
    assert len(block_files(folder)) == count // BLOCK


def test_a_context_may_be_asked_in_another_dtype(folder: Path) -> None:
    keep(folder, IDS)
    exact = answer(folder)
    for dtype, error in (("bfloat16", 0.1), ("float16", 0.01)):
        assert (answer(folder, dtype=dtype).float() - exact).abs().max() <= error * exact.abs().max()


def test_documents_are_listed(folder: Path) -> None:
    keep(folder, IDS)
    with closing(ContextReader(folder)) as reader:
        assert reader.context.documents(reader.state) == spans(IDS)
        assert reader.context.ids(reader.state) == IDS


# Prefill chunks that are smaller than an attention chunk, the same, as large as the block; that do not divide it,
# and are larger: one block, several, a whole number of them and not.
GRIDS = [
    (5, BLOCK),
    (CHUNK - 1, BLOCK),
    (CHUNK, BLOCK),
    (20, BLOCK),
    (BLOCK, BLOCK),
    (2 * CHUNK, 3 * CHUNK),
    (50, 4 * CHUNK),
    (BLOCK + 1, BLOCK),
    (2 * BLOCK, BLOCK),
    (100, BLOCK),
    (100, 3 * CHUNK),
    (1000, BLOCK),
]


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize(("prefill_chunk_size", "block_tokens"), GRIDS)
def test_a_resumed_run_writes_the_same_bytes(
    tmp_path: Path, prefill_chunk_size: int, block_tokens: int, kv_dtype: str
) -> None:
    kind = Kind(kv_dtype, prefill_chunk_size=prefill_chunk_size, block_tokens=block_tokens)
    keep(tmp_path / "whole", IDS, kind)
    at_once = min(prefill_chunk_size, len(IDS)) // block_tokens or 1  # blocks that are sealed in one step
    for stop in (1, 3 * BLOCK, 5 * BLOCK + CHUNK + 1, len(IDS)):
        folder = tmp_path / f"stopped at {stop}"
        keep(folder, IDS, kind, stop=stop)
        keep(folder, IDS, kind, stop=stop + 1)
        start = keep(folder, IDS, kind)
        assert stop - block_tokens * (at_once + 1) < start
        assert block_digests(folder) == block_digests(tmp_path / "whole")
        assert same(answer(folder, kind), fresh_answer(IDS, kind))


def of_twenty(change: Callable[[list[array[int]]], None]) -> array[int]:
    """Twenty documents of 17 tokens each, changed."""
    documents = [tokens(17, seed) for seed in range(20)]
    change(documents)
    return array("i", [token for document in documents for token in document])


TWENTY = of_twenty(lambda documents: None)
LENGTH, BLOCKS_OF_TWENTY = len(TWENTY), 10
assert LENGTH == BLOCKS_OF_TWENTY * BLOCK + CHUNK + 4
CHANGES: dict[str, tuple[array[int], int]] = {  # and the tokens before the first that differs
    "none": (TWENTY, LENGTH),
    "last changed": (of_twenty(lambda d: d.__setitem__(19, tokens(17, 99))), 19 * 17),
    "last token": (changed(TWENTY, LENGTH - 1), LENGTH - 1),
    "last grown": (TWENTY + tokens(10), LENGTH),
    "last but one": (of_twenty(lambda d: d.__setitem__(18, tokens(50, 99))), 18 * 17),
    "appended": (TWENTY + tokens(100), LENGTH),
    "last removed": (TWENTY[: 19 * 17], 19 * 17),
    "middle removed": (of_twenty(lambda d: d.__delitem__(10)), 170),
    "middle inserted": (of_twenty(lambda d: d.insert(10, tokens(60, 99))), 170),
    "at a block": (changed(TWENTY, 7 * BLOCK), 7 * BLOCK),
    "before a block": (changed(TWENTY, 7 * BLOCK - 1), 7 * BLOCK - 1),
    "behind a chunk": (changed(TWENTY, 7 * BLOCK + CHUNK + 1), 7 * BLOCK + CHUNK + 1),
    "cut within a block": (TWENTY[: 7 * BLOCK + CHUNK + 5], 7 * BLOCK + CHUNK + 5),
    "cut at a chunk": (TWENTY[: 7 * BLOCK + CHUNK], 7 * BLOCK + CHUNK),
    "cut at a block": (TWENTY[: 7 * BLOCK], 7 * BLOCK),
    "cut to a few": (TWENTY[:9], 9),
    "first changed": (changed(TWENTY, 0), 0),
    "all others": (tokens(100, 99), 0),
}


PACKED = ("none", "last changed", "appended", "behind a chunk", "at a block", "cut at a chunk")


@pytest.mark.parametrize(
    ("change", "kv_dtype"), [*((change, "float32") for change in CHANGES), *((change, "int8") for change in PACKED)]
)
def test_changed_documents_are_read_from_the_change_on(folder: Path, change: str, kv_dtype: str) -> None:
    """At most an attention chunk is read again, or a block where blocks are stored in another dtype.

    Asked beside the context, changed documents give the same answer; and so they do when changed back.
    """
    kind = Kind(kv_dtype)
    ids, before = CHANGES[change]
    start = before if change == "none" else before // CHUNK * CHUNK
    if kind.layout(0).is_packed and start < BLOCKS_OF_TWENTY * BLOCK:
        start -= start % BLOCK
    keep(folder, TWENTY, kind)
    assert close(answer(folder, kind, ids=ids), fresh_answer(ids, kind))
    assert keep(folder, ids, kind) == start
    assert same(answer(folder, kind), fresh_answer(ids, kind))
    assert close(answer(folder, kind, ids=TWENTY), fresh_answer(TWENTY, kind))
    keep(folder, TWENTY, kind)
    assert same(answer(folder, kind), fresh_answer(TWENTY, kind))
    state = Context.read(folder).complete
    assert state is not None
    assert block_files(folder) == sorted(Path(block.name).name for block in state.blocks)


@pytest.mark.parametrize("prefill_chunk_size", [5, 20, 3 * BLOCK])
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_changes_on_every_grid(folder: Path, prefill_chunk_size: int, kv_dtype: str) -> None:
    """Only rounding differs where a run resumes between two cuts of a fresh run's grid."""
    kind = Kind(kv_dtype, prefill_chunk_size=prefill_chunk_size)
    keep(folder, IDS, kind)
    for position in (5 * BLOCK + CHUNK + 3, 4 * BLOCK, 4 * BLOCK - 1):
        ids = changed(IDS, position)
        assert close(answer(folder, kind, ids=ids), fresh_answer(ids, kind))
        assert keep(folder, ids, kind) > 0
        assert close(answer(folder, kind), fresh_answer(ids, kind))


def test_many_changes(folder: Path) -> None:
    """One after the other, some interrupted and reused by the next: every answer is right, no stale file remains."""
    chance = random.Random(5)
    complete = latest = IDS
    for n in range(40):
        before = chance.choice([complete, latest])
        ids = before[: chance.choice([len(before), chance.randrange(1, len(before) + 1)])] + tokens(
            chance.choice([0, 20, 100]), seed=n
        )
        latest = ids = changed(ids, *(chance.randrange(len(ids)) for _ in range(chance.randrange(2))))[:300]
        keep(folder, ids, stop=chance.randrange(len(ids)) if n and chance.random() < 0.6 else None)
        if Context.read(folder).states[-1].is_complete:
            complete = ids
        assert same(answer(folder), fresh_answer(complete)), n
    keep(folder, latest)
    assert same(answer(folder), fresh_answer(latest))


def test_a_change_of_an_interrupted_change(folder: Path) -> None:
    """It resumes within a block that no other set of documents has, and does so again when interrupted itself."""
    keep(folder, IDS)
    second = changed(IDS, 2 * BLOCK)
    third = changed(second, 4 * BLOCK + CHUNK + 1)
    keep(folder, second, stop=5 * BLOCK)
    for _ in range(3):
        assert keep(folder, third, stop=0) == 4 * BLOCK + CHUNK
    assert same(answer(folder), fresh_answer(IDS))
    assert keep(folder, third) == 4 * BLOCK + CHUNK
    assert same(answer(folder), fresh_answer(third))


@pytest.mark.parametrize("sealed", [0, 1, 3])
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_an_interrupted_change_leaves_the_old_state_to_readers(folder: Path, sealed: int, kv_dtype: str) -> None:
    kind = Kind(kv_dtype)
    ids = changed(IDS, 2 * BLOCK + CHUNK + 2)
    start = 2 * BLOCK + (CHUNK if kv_dtype == "float32" else 0)
    keep(folder, IDS, kind)
    old = block_digests(folder)
    for _ in range(3):
        assert keep(folder, ids, kind, stop=(2 + sealed) * BLOCK if sealed else 0) == (
            start if not sealed or _ == 0 else (2 + sealed) * BLOCK
        )
        assert block_digests(folder) == old
        assert same(answer(folder, kind), fresh_answer(IDS, kind))
        assert same(answer(folder, kind, ids=ids), fresh_answer(ids, kind))
    assert journal_types(folder).count("begin") == 2
    assert keep(folder, ids, kind) == ((2 + sealed) * BLOCK if sealed else start)
    assert same(answer(folder, kind), fresh_answer(ids, kind))
    assert len(block_files(folder)) == 6


def test_readers_are_not_disturbed_by_a_writer(folder: Path) -> None:
    """Nor are their files deleted while they read, but afterwards."""
    keep(folder, IDS)
    old, ids = block_files(folder), changed(IDS, BLOCK + 3)
    with closing(ContextReader(folder)) as first:
        with closing(ContextWriter(folder, Kind().recipe)) as writer:
            for _ in reading(writer, ids):
                assert same(answer_of(first, residency=Residency(0)), fresh_answer(IDS))
                assert same(answer(folder), fresh_answer(IDS))
        assert same(answer(folder), fresh_answer(ids))
        assert same(answer_of(first), fresh_answer(IDS))
        assert set(old) < set(block_files(folder)) and len(block_files(folder)) == 6 + 5
    keep(folder, changed(ids, -1))
    assert len(block_files(folder)) == 6 and not set(old[1:]) & set(block_files(folder))


def test_two_readers_and_a_writer_at_the_same_time(folder: Path) -> None:
    versions = [changed(IDS, *(place for place in (20, 90, 150) if n & place)) for n in range(4)]
    expected = [fresh_answer(ids) for ids in versions]
    keep(folder, versions[0])
    done, answers, errors = threading.Event(), [0, 0], []

    def ask(reader: int) -> None:
        try:
            while not done.is_set() or not answers[reader]:
                found = answer(folder, residency=Residency(reader))
                assert any(same(found, right) for right in expected)
                answers[reader] += 1
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=ask, args=[n]) for n in range(2)]
    for thread in readers:
        thread.start()
    try:
        for n in range(1, 13):
            keep(folder, versions[n % 4])
    finally:
        done.set()
        for thread in readers:
            thread.join()
    assert not errors and min(answers) > 2, (errors, answers)


@pytest.mark.parametrize("is_first", [False, True])
def test_a_writer_may_end_between_two_looks_of_a_reader(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """The journal and the head are two files."""
    ids = changed(IDS, -1)
    if not is_first:
        keep(folder, IDS)
    with closing(ContextWriter(folder, Kind().recipe)) as writer:
        steps = reading(writer, ids)
        while next(steps) < len(ids):
            pass
        look = Journal.read

        def looked(file: Path) -> Any:
            records = look(file)
            assert next(steps, None) is None
            return records

        monkeypatch.setattr(Journal, "read", looked)
        if is_first:
            assert same(answer(folder), fresh_answer(ids[: 6 * BLOCK]))  # what is sealed, by the journal as it was
        else:
            found = answer(folder)
            assert same(found, fresh_answer(ids)) or same(found, fresh_answer(IDS))


def test_a_second_writer_is_refused(folder: Path) -> None:
    with closing(ContextWriter(folder, Kind().recipe)) as writer:
        steps = reading(writer, IDS)
        next(steps)
        before = files(folder)
        with pytest.raises(ContextError, match=f"{folder}: another process is writing to it"):
            keep(folder, IDS)
        assert files(folder) == before
        assert list(steps)[-1] == len(IDS)
    assert keep(folder, IDS) == len(IDS)


@pytest.mark.parametrize("locks", [True, False])
def test_a_folder_that_cannot_be_written_to_can_be_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    keep(folder, IDS)
    before, opened = files(folder), os.open

    def read_only(path: Any, flags: int, *arguments: Any, **others: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) or (not locks and str(path).endswith(".lock")):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *arguments, **others)

    monkeypatch.setattr(os, "open", read_only)
    assert same(answer(folder), fresh_answer(IDS))
    assert files(folder) == before
    with pytest.raises(DiskFullError, match="Read-only file system"):
        keep(folder, IDS)
    assert files(folder) == before


def test_opening_reads_no_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, only the tail's file is opened before the first token is computed."""
    opened, names = os.open, []

    def logged(path: Any, *arguments: Any, **others: Any) -> int:
        names.append(Path(path).relative_to(folder).as_posix().split("-")[0])
        return opened(path, *arguments, **others)

    for ids in (IDS[2 * BLOCK :], IDS):
        keep(folder, ids)
        with monkeypatch.context() as patch, closing(ContextReader(folder)) as reader:
            patch.setattr(os, "open", logged)
            cache = HybridKVCache(CONFIG, length=len(ids) + 50, layout=Kind().layout(len(ids) + 50))
            reader.context.restore(reader.state, cache, len(ids))
        assert set(names) == {"tail"} and len(names) <= 1 + CONFIG.num_hidden_layers
        names.clear()


def test_a_checksum_is_compared_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(folder, IDS)
    seen: list[int] = []
    monkeypatch.setattr(
        cache.disk, "zlib", SimpleNamespace(crc32=lambda content: (seen.append(len(content)), zlib.crc32(content))[1])
    )
    with closing(ContextReader(folder)) as reader:
        layout = Kind().layout(len(IDS) + 2 * len(QUESTION))
        kept = HybridKVCache(CONFIG, length=layout.length, layout=layout, residency=Residency(2))
        reader.context.restore(reader.state, kept, len(IDS))
        assert len(seen) == CONFIG.num_hidden_layers  # of the tail's layers
        logits(kept, "float32")
        assert len(seen) == 3 + 6 * layout.segments_per_block * CONFIG.num_nope_layers
        logits(kept, "float32")
        logits(kept.fork(), "float32")
        assert len(seen) == 3 + 6 * 4


def test_common_prefix() -> None:
    chance = random.Random(3)
    step = 1 << 18  # ids that are compared at once
    for length in [0, 1, 2, 3, 10, step - 1, step + 1, 2 * step + 5]:
        a = array("i", chance.choices(range(-3, 3), k=length))
        for place in {0, length // 3, length - 2, length - 1, step - 1, step}:
            b = a[:]
            if 0 <= place < length:
                b[place] += chance.choice([1, 1 << 8, 1 << 24, -1])
            for x, y in ((a, b), (a[:place], b), (a[:0], b)) if length > 10 else ((a, b), (a, b[:-1]), (a[:place], b)):
                naive = next((n for n, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
                assert common_prefix(x, memoryview(y)) == common_prefix(y, x) == naive
