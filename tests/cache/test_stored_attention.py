"""A step's attention through the cache: read as stored by vector code, or unpacked for the fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cache.hybrid import HybridKVCache
from cache.residency import Residency
from model.kernels.attend import attend
from model.kernels.masks import AttentionMask
from model.kernels.sdpa import sdpa
from model.simd import attending
from model.transformer import Transformer
from support import cache_toys
from support.cached_paths import CACHED_PATHS, STORED_PATHS, scratch, small_layout
from support.paths import full

pytest.importorskip("llvmlite")

HEADS, KV_HEADS, HEAD_DIM, CHUNK, TOKENS = 6, 2, 32, 24, 135
CONFIG = replace(
    cache_toys.CONFIG, num_attention_heads=HEADS, head_dim=HEAD_DIM, attention_chunk_size=CHUNK, num_hidden_layers=5
)
TYPES = {"auto": 1e-6, "bfloat16": 1e-6, "float16": 1e-6, "int8": 2e-4, "fp8": 1e-6}
"""How far from the fused kernels: in integers, queries and weights are rounded to 16 bits."""


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "SMALLEST", 0)


def filled(kv_dtype: str, residency: Residency, stack: ExitStack) -> HybridKVCache:
    """Five blocks of a segment and an open one; the seed is always the same."""
    layout = small_layout(CONFIG, length=200, kv_dtype=kv_dtype)
    rows = stack.enter_context(scratch())
    cache = HybridKVCache(CONFIG, length=200, layout=layout, residency=residency, rows=rows)
    generator = torch.Generator().manual_seed(3)
    for start in range(0, TOKENS, CHUNK):
        tokens = min(CHUNK, TOKENS - start)
        for layer in range(CONFIG.num_hidden_layers):
            cache.append(layer, *torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, generator=generator))
        cache.advance(tokens)
    return cache


def attended(cache: HybridKVCache, tokens: int) -> list[Tensor]:
    """Of the newest queries, in each layer."""
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(CONFIG.num_hidden_layers, 1, HEADS, tokens, HEAD_DIM, generator=generator)
    positions = range(TOKENS - tokens, TOKENS)
    return [
        attend(q[layer], positions, cache.segments(layer, positions), mask_of(layer), sdpa)
        for layer in range(CONFIG.num_hidden_layers)
    ]


def mask_of(layer: int) -> AttentionMask:
    return AttentionMask(CHUNK if CONFIG.uses_rope(layer) else None)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kv_dtype", TYPES)
def test_it_is_what_the_fused_kernels_give(
    kv_dtype: str, tokens: int, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every tier the same, to the last bit."""
    everywhere = [filled(kv_dtype, Residency(host_rows), stack) for host_rows in (None, 0, 2)]
    found = [attended(cache, tokens) for cache in everywhere]
    again = [attended(cache, tokens) for cache in everywhere]  # by now some of what was read is kept
    monkeypatch.setattr(attending, "MOST_QUERIES", 0)
    for layer, expected in enumerate(attended(everywhere[0], tokens)):
        assert (found[0][layer] - expected).abs().max() <= TYPES[kv_dtype] * expected.abs().max()
        assert all(torch.equal(other[layer], found[0][layer]) for other in (*found, *again))


def test_a_step_of_an_answer_unpacks_nothing(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    for host_rows in (None, 0):
        cache = filled("int8", Residency(host_rows), stack)
        with monkeypatch.context() as patch:
            patch.setattr("cache.tiers.unpack", lambda *_: pytest.fail("unpacked"))
            attended(cache, 1)


def test_segments_in_memory_are_attended_in_one_call(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = attending.FewQueries._attend
    monkeypatch.setattr(
        attending.FewQueries, "_attend", lambda self, segments: (calls.append(len(segments)), original(self, segments))
    )
    attended(filled("auto", Residency(), stack), 1)
    assert calls == [6 if not CONFIG.uses_rope(layer) else 1 for layer in range(CONFIG.num_hidden_layers)]
    calls.clear()
    attended(filled("int8", Residency(), stack), 1)
    assert calls.count(5) == 2  # and the open one, which is not in that form


def test_blocks_that_move_are_found_where_they_are(stack: ExitStack) -> None:
    """What was known of a segment's place is forgotten."""
    cache = filled("bfloat16", Residency(), stack)
    before = attended(cache, 1)
    for store in cache.stores:
        for block in store.sealed:
            assert None not in block.segments
            block.move([packed and packed.to(torch.clone) for packed in block.segments])
    assert all(torch.equal(a, b) for a, b in zip(before, attended(cache, 1), strict=True))
    for store in cache.stores:
        for block in store.sealed:
            zeros = [packed and packed.to(torch.zeros_like) for packed in block.segments]
            block.place = block.place._replace(segments=zeros)
    assert not torch.equal(before[1], attended(cache, 1)[1])


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(5)
    model = Transformer(replace(CONFIG, attention_chunk_size=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", CACHED_PATHS | STORED_PATHS)
def test_a_model_computes_the_same_on_every_path(name: str, model: Transformer) -> None:
    """Where a path has a counterpart in memory, to the last bit."""
    ids = torch.randint(0, CONFIG.vocab_size, (1, 90), generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        if name in CACHED_PATHS:
            torch.testing.assert_close(CACHED_PATHS[name](model, ids), full(model, ids), rtol=1e-5, atol=3e-6)
        else:
            path, in_memory = STORED_PATHS[name]
            assert torch.equal(path(model, ids), in_memory(model, ids))
