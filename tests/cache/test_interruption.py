"""Ctrl-C at any moment of a forward leaves the cache either as it was or with the whole step committed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.chunked import ChunkedKVCache
from cache.disk import Scratch, UnitFile
from cache.hybrid import HybridKVCache
from cache.offloaded import OffloadedKVCache
from cache.residency import Residency, held_bytes
from cache.sealed import SealedBlock
from cache.tiers import Tiers
from model.weights.loading import load_checkpoint
from support.cache_toys import CHUNK, LAYERS, make, random_keys_values
from support.cached_paths import new_cache, scratch
from support.tier_toys import BLOCK, filled, restored, same, shown


class InterruptedOnce:
    """Wraps a method: its `number`-th call raises KeyboardInterrupt, before its work or after it, in any thread."""

    def __init__(self, method: Callable[..., Any], number: int, *, after: bool) -> None:
        self.method, self.number, self.after = method, number, after
        self.calls = itertools.count(1)

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            is_it = next(self.calls) == self.number
            if is_it and not self.after:
                raise KeyboardInterrupt
            result = self.method(instance, *args, **kwargs)
            if is_it:
                raise KeyboardInterrupt
            return result

        return call


@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.matrix), True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ChunkedKVCache, "append"),
        (ChunkedKVCache, "finish"),
        (ChunkedKVCache, "settle"),
        (OffloadedKVCache, "append"),
        (OffloadedKVCache, "settle"),
    ],
)
def test_the_cache_goes_on_from_its_offset(
    toys: Any, monkeypatch: pytest.MonkeyPatch, kind: type, name: str, after: bool
) -> None:
    """Steps shorter and longer than the attention chunk of 7, begun inside one and at its boundary."""
    model = load_checkpoint(toys("scout", 0.25).folder, dtype=torch.float32)
    ids = torch.arange(61).remainder(model.config.vocab_size)[None]
    expected, both = model(ids), 2 * toys("scout", 0.25).limit(1, 61)  # of two ways to compute the same
    assert expected is not None
    for number in (1, 2, 5, 7, 13, 20):
        cache = new_cache(model, ids)
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, InterruptedOnce(getattr(kind, name), number, after=after))
            while cache.offset < ids.shape[1]:
                start = cache.offset
                stop = min(start + (5, 16, 9, 2, 14)[start % 5], ids.shape[1])
                try:
                    logits = model(ids[:, start:stop], cache)
                except KeyboardInterrupt:
                    assert cache.offset in (start, stop)
                    continue
                assert logits is not None
                difference = (logits - expected[:, start:stop]).abs().max()
                assert difference <= both * expected.abs().max()


STEPS = (5, BLOCK, 1, 2 * CHUNK + 3, 3, BLOCK + 2, 1)
Shown = list[list[tuple[int, torch.Tensor, torch.Tensor]]]


@pytest.fixture(scope="module")
def rows() -> Iterator[Scratch]:
    with scratch() as opened:
        yield opened


def forward(cache: HybridKVCache, tokens: int) -> Shown:
    """One forward of tokens that depend on the offset alone; returns what its layers showed."""
    offset = cache.offset
    torch.manual_seed(offset)
    seen = []
    for layer in LAYERS:
        cache.append(layer, *random_keys_values(cache, tokens))
        seen.append(shown(cache, layer, range(offset, offset + tokens)))
    cache.advance(tokens)
    return seen


def run(cache: HybridKVCache, steps: Sequence[int]) -> dict[int, tuple[int, Shown]]:
    """By offset: how many tokens come next, and what is shown then."""
    seen = {}
    for tokens in steps:
        offset = cache.offset
        seen[offset] = tokens, forward(cache, tokens)
    return seen


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(
            (Tiers, name)
            for name in (
                "seal",
                "to_host",
                "prepare",
                "stream",
                "_fetched",
                "_in_background",
                "_read",
                "_keep",
                "_room",
                "_unpack_buffer",
            )
        ),
        (SealedBlock, "move"),
        (SealedBlock, "drop_from_memory"),
        (UnitFile, "read"),
        (Scratch, "write"),
        (HybridKVCache, "_place"),
        (HybridKVCache, "_write"),
        (HybridKVCache, "advance"),
        (OffloadedKVCache, "segments"),
        (OffloadedKVCache, "segment"),
        (OffloadedKVCache, "settle"),
    ],
)
def test_a_cache_on_disk_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Scratch, kind: type, name: str, after: bool
) -> None:
    """Restored from packed blocks, the newest promoted: what is shown and held equals a run without Ctrl-C."""
    cache, saved = filled(3 * BLOCK + 2, tmp_path, kv_dtype="int8", length=200)
    straight = cache.fork()
    steps = run(straight, STEPS)
    for number in (1, 2, 5, 11):
        other = restored(cache, saved, 1, rows=rows)
        interrupted = 0
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, InterruptedOnce(getattr(kind, name), number, after=after))
            while other.offset < straight.offset:
                tokens, expected = steps[start := other.offset]
                try:
                    seen = forward(other, tokens)
                except KeyboardInterrupt:
                    interrupted += 1
                    assert other.offset in (start, start + tokens)
                    continue
                assert all(map(same, seen, expected))
        assert interrupted == 1 or number > 1
        assert same(shown(other, 1, range(1)), shown(straight, 1, range(1)))
        held, closed_form = other.held(), held_bytes(other.layout, other.offset, other.residency)
        assert (held.nope, held.buffers, held.rope_windows) == (
            closed_form.nope,
            closed_form.buffers,
            closed_form.rope_windows,
        )
        assert other.fork().held() == held


def test_ctrl_c_after_ctrl_c(monkeypatch: pytest.MonkeyPatch, rows: Scratch) -> None:
    """In a new run, at the second call of what writes and drops, in every step that comes so far."""
    straight = make(length=200)
    steps = run(straight, (*STEPS, *STEPS))
    cache = make(length=200, residency=Residency(1), rows=rows)
    interrupted = 0
    while cache.offset < straight.offset:
        tokens, expected = steps[cache.offset]
        try:
            with monkeypatch.context() as patch:
                for kind, name in ((HybridKVCache, "_write"), (Scratch, "write"), (SealedBlock, "drop_from_memory")):
                    patch.setattr(kind, name, InterruptedOnce(getattr(kind, name), 2, after=interrupted % 2 == 0))
                seen = forward(cache, tokens)
        except KeyboardInterrupt:
            interrupted += 1
            continue
        assert all(map(same, seen, expected))
    forward(cache, BLOCK)
    assert interrupted >= 4
    assert cache.held() == held_bytes(cache.layout, cache.offset, cache.residency)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_ctrl_c_between_the_layers_of_a_row(monkeypatch: pytest.MonkeyPatch, rows: Scratch, number: int) -> None:
    """A row is written, but only some of its blocks have the file: it is written again."""
    calls = itertools.count(1)

    def set_file(block: SealedBlock, file: UnitFile | None) -> None:
        if file is not None and next(calls) == number:
            raise KeyboardInterrupt
        vars(block)["file"] = file

    straight = make(length=200)
    steps = run(straight, STEPS)
    cache = make(length=200, residency=Residency(1), rows=rows)
    interrupted = 0
    monkeypatch.setattr(SealedBlock, "file", property(lambda block: vars(block)["file"], set_file), raising=False)
    while cache.offset < straight.offset:
        tokens, expected = steps[cache.offset]
        try:
            seen = forward(cache, tokens)
        except KeyboardInterrupt:
            interrupted += 1
            continue
        assert all(map(same, seen, expected))
    assert interrupted == 1 and cache.held() == held_bytes(cache.layout, cache.offset, cache.residency)


@pytest.mark.parametrize("number", range(1, 2 * len(LAYERS) + 1))
def test_what_is_saved_after_an_interrupted_commit(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The tokens are committed once the offset says so, though not every layer has settled."""
    straight, cache = make(length=200), make(length=200)
    for tokens in (5, 2 * BLOCK + CHUNK + 3):  # from inside a chunk into another one
        forward(straight, tokens)
    forward(cache, 5)
    settled, advance = itertools.count(1), HybridKVCache.advance

    def interrupted(cache: HybridKVCache, num_tokens: int) -> None:
        with monkeypatch.context() as patch:
            for kind in (ChunkedKVCache, OffloadedKVCache):

                def settle(layer: Any, offset: int, original: Callable[..., None] = kind.settle) -> None:
                    for is_after in (False, True):
                        if next(settled) == number:
                            raise KeyboardInterrupt
                        if not is_after:
                            original(layer, offset)

                patch.setattr(kind, "settle", settle)
            advance(cache, num_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(HybridKVCache, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forward(cache, 2 * BLOCK + CHUNK + 3)
    assert cache.offset == straight.offset
    assert [same(*([(layer, *cache.tail()[layer])] for cache in (cache, straight))) for layer in LAYERS] == [True] * 5
    assert all(map(same, forward(cache.fork(), 3), forward(straight.fork(), 3)))
