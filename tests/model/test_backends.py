"""Attention over segments against a naive float64 softmax: every backend, any segmentation, any precision."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import model.kernels.sdpa
from model.config import BACKEND_NAMES
from model.kernels.attend import AttentionState, KVSegment, attend, merge
from model.kernels.masks import AttentionMask
from model.kernels.registry import backend
from support.error_budget import limit

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 10
BACKENDS = {name: backend(name) for name in BACKEND_NAMES}

pytestmark = pytest.mark.usefixtures("small_products")


def naive(
    q: Tensor, k: Tensor, v: Tensor, positions: range, chunk: int | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Softmax attention with repeated keys; keys start at position 0. Output and log-sum-exp."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(groups, 1) for x in (k, v))
    scores = q.to(dtype) @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    for row, position in enumerate(positions):
        first = 0 if chunk is None else position // chunk * chunk
        scores[:, :, row, :first] = -torch.inf
        scores[:, :, row, position + 1 :] = -torch.inf
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def expected_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: range, chunk: int | None
) -> tuple[Tensor, float, Tensor, float]:
    """Output and log-sum-exp in float64, each with the largest difference that is allowed in float32."""
    exact, rounded = (naive(q, k, v, positions, chunk, dtype) for dtype in (torch.float64, torch.float32))
    (out, lse), limits = exact, [limit(x, y) * x.abs().max().item() for x, y in zip(exact, rounded, strict=True)]
    return out, limits[0], lse, limits[1]


def tensors(
    seed: int, batch: int, kv_batch: int, t: int, s: int, kv_heads: int = KV_HEADS, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries strided as the model's are, (B, T, H, D) in memory; keys and values head-major."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, t, HEADS, HEAD_DIM, generator=generator).transpose(1, 2)
    k, v = torch.randn(2, kv_batch, kv_heads, s, HEAD_DIM, generator=generator)
    return q * scale, k * scale, v


def cut(k: Tensor, v: Tensor, generator: random.Random) -> list[KVSegment]:
    """Up to five segments that together are all the keys."""
    s = k.shape[2]
    ends = sorted({0, s, *(generator.randrange(s) for _ in range(generator.randrange(5)))})
    return [KVSegment(k[:, :, a:b], v[:, :, a:b], a) for a, b in itertools.pairwise(ends)]


KERNEL_KINDS = ("grouping kernel", "group by group")
BACKENDS_WITH_KERNELS = [
    (name, kind) for name in BACKENDS for kind in KERNEL_KINDS[: 2 if name in ("sdpa", "matmul") else 1]
]
"""Each of KERNEL_KINDS for the backends that use the fused kernel."""


@pytest.fixture
def _kernel_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the fused kernel takes fewer key heads than query heads; older ones do not."""
    if request.param == "group by group":
        monkeypatch.setattr(model.kernels.sdpa, "_groups_queries", lambda q: False)
    elif not model.kernels.sdpa._groups_queries_on_cpu():
        pytest.skip("this torch's kernel takes no fewer key heads than query heads")


@pytest.mark.usefixtures("_kernel_kind")
@pytest.mark.parametrize(("backend", "_kernel_kind"), BACKENDS_WITH_KERNELS, indirect=["_kernel_kind"])
@pytest.mark.parametrize("chunk", [None, 3, 7, 64])
def test_any_segmentation_equals_the_naive_softmax(backend: str, chunk: int | None) -> None:
    """flex, uncompiled, is slow: fewer cases; test_flex.py has others."""
    generator = random.Random(0)
    for seed in range(8 if backend == "flex" else 40):
        batch, t, offset = generator.choice([1, 2, 3]), generator.choice([1, 2, 5, 16, 40]), generator.randrange(30)
        kv_batch = generator.choice([1, batch]) if chunk is None else batch
        kv_heads = generator.choice([1, 2, 3, 6])
        q, k, v = tensors(seed, batch, kv_batch, t, offset + t, kv_heads)
        positions = range(offset, offset + t)
        before = q.clone(), k.clone(), v.clone()
        segments = cut(k, v, generator)
        out = attend(q, positions, segments, AttentionMask(chunk), BACKENDS[backend])
        expected, allowed, *_ = expected_attention(q, k, v, positions, chunk)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert (out - expected).abs().max() <= allowed, (seed, batch, kv_batch, kv_heads, t, offset)
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True)), "inputs are the caller's"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [1, 5, 40])
def test_chunked_queries_of_several_rows_over_one_row_of_keys(backend: str, t: int) -> None:
    """Also where several whole chunks of the queries meet their keys in one batch of tiles."""
    q, k, v = tensors(t, 3, 1, t, 4 + t)
    positions = range(4, 4 + t)
    out = attend(q, positions, [KVSegment(k, v, 0)], AttentionMask(7), BACKENDS[backend])
    expected, allowed, *_ = expected_attention(q, k, v, positions, 7)
    assert (out - expected).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_segments_that_no_query_sees_do_nothing(backend: str, chunk: int | None) -> None:
    """Keys after the queries, and for chunked layers keys of older chunks, may be among the segments."""
    q, k, v = tensors(3, 2, 2, 3, 30)
    positions = range(15, 18)
    segments = [KVSegment(k[:, :, a:b], v[:, :, a:b], a) for a, b in ((0, 4), (4, 13), (13, 16), (16, 20), (20, 30))]
    out = attend(q, positions, segments, AttentionMask(chunk), BACKENDS[backend])
    expected, allowed, *_ = expected_attention(q, k, v, positions, chunk)
    assert (out - expected).abs().max() <= allowed


@pytest.mark.usefixtures("_kernel_kind")
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(("backend", "_kernel_kind"), BACKENDS_WITH_KERNELS, indirect=["_kernel_kind"])
def test_log_sum_exp(backend: str, chunk: int | None) -> None:
    """What a backend yields, merged by hand: the log-sum-exp equals the naive one."""
    q, k, v = tensors(5, 2, 2, 24, 40)
    positions = range(16, 40)
    *_, expected_lse, allowed = expected_attention(q, k, v, positions, chunk)
    lse = torch.full((2, HEADS, 24), -torch.inf)
    for segment in (KVSegment(k[:, :, :25], v[:, :, :25], 0), KVSegment(k[:, :, 25:], v[:, :, 25:], 25)):
        for rows, part in BACKENDS[backend](q, positions, segment, AttentionMask(chunk)):
            assert part.lse.dtype == torch.float32 and part.lse.shape == (2, HEADS, len(rows))
            here = lse[:, :, rows.start : rows.stop]
            here.copy_(torch.logaddexp(here, part.lse))
    assert (lse - expected_lse).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_within_the_references_own_error(backend: str, dtype: torch.dtype) -> None:
    """The budget is the float64 error of softmax attention computed by the book in the low precision itself."""
    for seed in range(8):
        q, k, v = (x.to(dtype) for x in tensors(seed, 2, 2, 24, 40, scale=2.0))
        positions = range(16, 40)
        expected, _ = naive(q, k, v, positions, None)
        mask = AttentionMask()
        hidden = ~mask.mask_mod(0, 0, torch.arange(16, 40)[:, None], torch.arange(40))
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        scores = (q @ keys.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf)
        budget = (scores.softmax(-1) @ values - expected).abs().max()
        segments = cut(k, v, random.Random(seed))
        out = attend(q, positions, segments, mask, BACKENDS[backend])
        assert out.dtype == dtype
        assert 0 < (out - expected).abs().max() <= budget


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scores_stay_finite(backend: str) -> None:
    """Scores in the thousands: weights underflow, nothing overflows, and the largest key wins."""
    q, k, v = tensors(7, 1, 1, 9, 20, scale=60.0)
    positions = range(11, 20)
    out = attend(q, positions, cut(k, v, random.Random(1)), AttentionMask(), BACKENDS[backend])
    assert (out - naive(q, k, v, positions, None)[0]).abs().max() < 1e-3


def state(seed: int) -> AttentionState:
    generator = torch.Generator().manual_seed(seed)
    return AttentionState(torch.randn(2, 6, 3, 10, generator=generator), torch.randn(2, 6, 3, generator=generator))


EMPTY = AttentionState(torch.zeros(2, 6, 3, 10), torch.full((2, 6, 3), -torch.inf))


def test_merging_with_nothing_changes_nothing() -> None:
    something = state(0)
    for merged in (merge(something, EMPTY), merge(EMPTY, something)):
        assert torch.equal(merged.out, something.out) and torch.equal(merged.lse, something.lse)
    nothing = merge(EMPTY, EMPTY)
    assert torch.equal(nothing.out, EMPTY.out) and torch.equal(nothing.lse, EMPTY.lse), "no NaN from -inf - -inf"


def test_merging_is_commutative_and_associative() -> None:
    a, b, c = state(0), state(1), state(2)
    for left, right in ((merge(a, b), merge(b, a)), (merge(merge(a, b), c), merge(a, merge(b, c)))):
        assert torch.allclose(left.out, right.out, atol=1e-6) and torch.allclose(left.lse, right.lse, atol=1e-6)


def test_merging_by_definition() -> None:
    a, b = state(0), state(1)
    weights = a.lse.double().exp()[..., None], b.lse.double().exp()[..., None]
    expected = (a.out * weights[0] + b.out * weights[1]) / (weights[0] + weights[1])
    merged = merge(a, b)
    assert (merged.out - expected).abs().max() < 1e-6
    assert (merged.lse - (weights[0] + weights[1]).log()[..., 0]).abs().max() < 1e-6


def test_merging_far_apart_keeps_the_larger() -> None:
    a = state(0)
    for distance in (1e3, 1e30):
        far = AttentionState(state(1).out, a.lse - distance)
        merged = merge(a, far)
        assert torch.equal(merged.out, a.out) and torch.equal(merged.lse, a.lse)


def test_a_segment_is_used_before_the_next_is_asked_for() -> None:
    """A cache reuses its buffer: what a segment held is garbage once the next one is asked for."""
    q, k, v = tensors(9, 2, 2, 12, 30)
    positions = range(18, 30)

    def reused() -> Iterator[KVSegment]:
        keys, values = torch.empty(2, KV_HEADS, 6, HEAD_DIM), torch.empty(2, KV_HEADS, 6, HEAD_DIM)
        for start in range(0, 30, 6):
            keys.copy_(k[:, :, start : start + 6])
            values.copy_(v[:, :, start : start + 6])
            yield KVSegment(keys, values, start)
            keys.fill_(torch.nan)
            values.fill_(torch.nan)

    for attention in BACKENDS.values():
        for chunk in (None, 7):
            out = attend(q, positions, reused(), AttentionMask(chunk), attention)
            expected, allowed, *_ = expected_attention(q, k, v, positions, chunk)
            assert (out - expected).abs().max() <= allowed


def test_one_new_token_over_many_rows_reads_a_shared_segment() -> None:
    """Segments with one row under a batch: many questions to one context, mixed with rows of their own."""
    generator = random.Random(4)
    q, k, v = tensors(11, 4, 1, 1, 20)
    own = torch.randn(2, 4, KV_HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    segments = [*cut(k, v, generator), KVSegment(own[0], own[1], 20)]
    keys = torch.cat((k.expand(4, -1, -1, -1), own[0]), 2)
    values = torch.cat((v.expand(4, -1, -1, -1), own[1]), 2)
    for attention in BACKENDS.values():
        out = attend(q, range(20, 21), segments, AttentionMask(), attention)
        expected, allowed, *_ = expected_attention(q, keys, values, range(20, 21), None)
        assert (out - expected).abs().max() <= allowed
