"""Attention by vector code against a naive float64 softmax over what the stored numbers mean."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.kernels.attend import _COMPARISONS, AttentionState, KVSegment, attend, attention_state
from model.kernels.eager import eager
from model.kernels.flex import flex
from model.kernels.masks import AttentionMask
from model.kernels.sdpa import sdpa
from model.simd import attending, products
from model.simd.attending import FewQueries

pytest.importorskip("llvmlite")

FORMS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SHAPES = [  # query heads, KV heads, head_dim, tokens, lengths
    (10, 2, 128, 1, [64, 576]),
    (3, 3, 64, 5, [64, 1152, 192]),
    (8, 1, 32, 3, [64, 64]),
    (14, 2, 16, 1, [128, 64, 64]),
    (2, 1, 48, 2, [640]),
    (1, 1, 256, 1, [64]),
]
ERROR = 1e-6
"""Relative, of outputs and log-sum-exp: some ten roundings to float32."""

INTEGER_ERROR = 1e-4
"""The same for products in integers of 16 bits."""


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "SMALLEST", 0)


def multiply_by(integers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = products.find_engine()
    assert engine is not None
    monkeypatch.setattr(engine, "integers", integers)


def coded(x: Tensor, dtype: torch.dtype, group: int, shared_over: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales (B, H, groups, 1, D) or (B, H, groups, group, 1), and what they stand for in float64."""
    grouped = x.unflatten(2, (-1, group))
    scales = grouped.abs().amax(shared_over, keepdim=True) / LARGEST_CODE[dtype]
    scaled = grouped / scales
    codes = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return codes.flatten(2, 3), scales, (codes.double() * scales.double()).flatten(2, 3)


def stored(
    keys: Tensor, values: Tensor, start: int, dtype: torch.dtype, group: int
) -> tuple[KVSegment, Tensor, Tensor]:
    """A segment in a form, and the keys and values that it stands for in float64."""
    if dtype not in LARGEST_CODE:
        k, v = keys.to(dtype), values.to(dtype)
        return KVSegment(k, v, start, stays=True), k.double(), v.double()
    key_codes, key_scales, k = coded(keys, dtype, group, 3)
    value_codes, value_scales, v = coded(values, dtype, group, 4)
    segment = KVSegment(key_codes, value_codes, start, key_scales[:, :, :, 0], value_scales.flatten(2, 3), stays=True)
    return segment, k, v


def made(
    name: str, kv_shape: tuple[int, int, int], lengths: list[int], group: int = 64, size: float = 1.0
) -> tuple[list[KVSegment], Tensor, Tensor]:
    """Segments of these lengths, and all of their keys and values."""
    rows, heads, head_dim = kv_shape
    parts, start = [], 0
    for length in lengths:
        keys, values = (torch.randn(rows, heads, length, head_dim) for _ in range(2))
        parts.append(stored(keys * size, values, start, FORMS[name], group))
        start += length
    segments, keys, values = zip(*parts, strict=True)
    return list(segments), torch.cat(keys, 2), torch.cat(values, 2)


def naive(q: Tensor, keys: Tensor, values: Tensor, first: int) -> AttentionState:
    """In float64; a query sees the keys up to its own position."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.expand(len(q), -1, -1, -1).repeat_interleave(group, 1) for x in (keys, values))
    scores = q.double() @ keys.transpose(2, 3) / q.shape[3] ** 0.5
    positions = torch.arange(first, first + q.shape[2])
    scores.masked_fill_(torch.arange(keys.shape[2]) > positions[:, None], -torch.inf)
    return AttentionState(scores.softmax(-1) @ values, scores.logsumexp(-1))


def few(q: Tensor, first: int, segments: list[KVSegment]) -> AttentionState:
    rows, heads = segments[0].keys.shape[:2]
    queries = FewQueries(q, first, rows, heads)
    for segment in segments:
        assert attending.is_readable(segment)
        queries.add(segment)
    return AttentionState(*queries.finish())


def error_of(name: str) -> float:
    return INTEGER_ERROR if name == "int8" else ERROR


def check(found: AttentionState, expected: AttentionState, error: float = ERROR) -> None:
    largest = expected.out.abs().max().clamp(min=1.0)
    assert (found.out - expected.out).abs().max() <= error * largest
    assert (found.lse - expected.lse).abs().max() <= error * expected.lse.abs().max().clamp(min=10.0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *itertools.product(("float32", "int8"), SHAPES),
        *itertools.product(("bfloat16", "fp8"), SHAPES[::2]),
        *itertools.product(("float16",), SHAPES[1::2]),
    ],
    ids=str,
)
def test_every_form_and_shape(name: str, shape: tuple[int, int, int, int, list[int]]) -> None:
    heads, kv_heads, head_dim, tokens, lengths = shape
    torch.manual_seed(heads)
    segments, keys, values = made(name, (1, kv_heads, head_dim), lengths)
    q = torch.randn(1, heads, tokens, head_dim)
    first = sum(lengths) - tokens
    found = few(q, first, segments)
    assert found.out.dtype == found.lse.dtype == torch.float32 and found.out.shape == q.shape
    check(found, naive(q, keys, values, first), error_of(name))


@pytest.mark.parametrize("integers", ["", "madd"])
def test_8_bit_codes_without_the_newest_instructions(integers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers give the same whatever multiplies them; float32 is more precise."""
    torch.manual_seed(15)
    segments, keys, values = made("int8", (1, 2, 64), [640])
    q = torch.randn(1, 6, 2, 64)
    before = few(q, 638, segments)
    engine = products.find_engine()
    assert engine is not None
    if engine.integers == "" and integers:
        pytest.skip("this processor has no such instruction")
    was = engine.integers
    multiply_by(integers, monkeypatch)
    found = few(q, 638, segments)
    check(found, naive(q, keys, values, 638), INTEGER_ERROR if integers else ERROR)
    assert torch.equal(found.out, before.out) == (bool(integers) == bool(was))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
def test_queries_in_every_type(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    segments, keys, values = made(name, (1, 2, 32), [128])
    q = torch.randn(1, 3, 4, 32).transpose(1, 2).to(dtype)
    check(few(q, 125, segments), naive(q, keys, values, 125), error_of(name))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1500])
def test_every_length(length: int) -> None:
    """All keys count, and no more: what lies behind them is not a number."""
    torch.manual_seed(length)
    for tokens in (1, min(3, length)):
        keys, values = (torch.full((1, 2, length + 16, 32), torch.nan) for _ in range(2))
        for x in (keys, values):
            x[:, :, :length] = torch.randn(1, 2, length, 32)
        q, first = torch.randn(1, 4, tokens, 32), length - tokens
        found = few(q, first, [KVSegment(keys[:, :, :length], values[:, :, :length], 0)])
        check(found, naive(q, keys[:, :, :length].double(), values[:, :, :length].double(), first))


@pytest.mark.parametrize("group", [1, 3, 7, 10, 49, 64])
def test_groups_of_any_size_have_their_own_scales(group: int) -> None:
    torch.manual_seed(group)
    for name in ("int8", "fp8"):
        segments, keys, values = made(name, (2, 2, 32), [group, 5 * group], group)
        q = torch.randn(2, 6, 1, 32)
        check(few(q, 6 * group - 1, segments), naive(q, keys, values, 6 * group - 1), error_of(name))


@pytest.mark.parametrize("tokens", range(1, 9))
def test_queries_see_the_keys_up_to_their_own(tokens: int) -> None:
    """Also where segments begin behind some of the queries, or behind all of them."""
    torch.manual_seed(tokens)
    segments, keys, values = made("bfloat16", (1, 1, 64), [100, 3, 1, 2, 70])
    q = torch.randn(1, 5, tokens, 64)
    check(few(q, 100, segments), naive(q, keys, values, 100))


def test_a_query_without_a_key_has_no_weight() -> None:
    segments, _, _ = made("float32", (1, 1, 32), [40])
    (segment,) = segments
    late = KVSegment(segment.keys, segment.values, 10)
    state = few(torch.randn(1, 2, 4, 32), 8, [late])
    assert bool((state.lse[:, :, :2] == -torch.inf).all()) and not state.out[:, :, :2].any()
    assert bool(state.lse[:, :, 2:].isfinite().all())


def test_a_query_s_result_does_not_depend_on_the_others() -> None:
    """So a draft is checked by the numbers that single steps would give."""
    torch.manual_seed(5)
    for name, heads in itertools.product(FORMS, (5, 16)):
        segments, _, _ = made(name, (1, 1, 64), [576, 64])
        q = torch.randn(1, heads, 3, 64)
        together = few(q, 600, segments)
        for i in range(3):
            alone = few(q[:, :, i : i + 1], 600 + i, segments)
            assert torch.equal(alone.out, together.out[:, :, i : i + 1])
            assert torch.equal(alone.lse, together.lse[:, :, i : i + 1])


def test_rows_of_a_batch_share_keys_or_have_their_own() -> None:
    torch.manual_seed(6)
    for rows in (1, 16):
        segments, keys, values = made("bfloat16", (rows, 2, 32), [600])
        q = torch.randn(16, 4, 2, 32)
        check(few(q, 590, segments), naive(q, keys, values, 590))


@pytest.mark.parametrize("name", FORMS)
def test_results_do_not_depend_on_threads_or_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    segments, _, _ = made(name, (1, 3, 32), [1024, 1024, 640])
    q = torch.randn(1, 6, 2, 32)
    expected = few(q, 2600, segments)
    for threads, state_bytes in itertools.product((1, 2, 5), (1, 2**20)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(attending, "STATE_BYTES", state_bytes)
        together = few(q, 2600, segments)
        one_by_one = FewQueries(q, 2600, 1, 3)
        for segment in segments:
            one_by_one.add(segment)
            one_by_one.flush()
        for state in (together, AttentionState(*one_by_one.finish())):
            assert torch.equal(state.out, expected.out) and torch.equal(state.lse, expected.lse)


def test_threads_of_our_own_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.simd import engine

    torch.manual_seed(8)
    segments, _, _ = made("int8", (1, 3, 32), [1024])
    q = torch.randn(1, 6, 1, 32)
    expected = few(q, 1023, segments)
    monkeypatch.setattr(engine, "find_openmp", lambda: None)
    other = engine.Engine()
    monkeypatch.setattr(products, "find_engine", lambda: other)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(few(q, 1023, segments).out, expected.out)


def test_segments_in_several_forms() -> None:
    torch.manual_seed(9)
    parts, keys, values, start = [], [], [], 0
    for name in ("int8", "int8", "bfloat16", "fp8", "float32", "float32"):
        k, v = (torch.randn(1, 2, 128, 64) for _ in range(2))
        segment, *meant = stored(k, v, start, FORMS[name], 64)
        parts.append(segment)
        keys.append(meant[0])
        values.append(meant[1])
        start += 128
    q = torch.randn(1, 4, 3, 64)
    check(few(q, start - 3, parts), naive(q, torch.cat(keys, 2), torch.cat(values, 2), start - 3), INTEGER_ERROR)


def test_views_with_strides_of_any_kind() -> None:
    torch.manual_seed(10)
    wide, long = torch.randn(1, 50, 2, 3, 32), torch.randn(2, 1, 2, 90, 32)
    keys = wide[:, 3:43, :, 1].transpose(1, 2)
    values = long[1, :, :, 20:60]
    q = torch.randn(1, 5, 4, 64)[..., 7:39].transpose(1, 2)
    check(few(q, 35, [KVSegment(keys, values, 0)]), naive(q, keys.double(), values.double(), 35))


@pytest.mark.parametrize("size", [0.0, 1e-30, 30.0, 1e4])
def test_extreme_scores(size: float) -> None:
    """Weights of 0 or 1, scores that are all equal, and a largest score that comes last."""
    torch.manual_seed(11)
    segments, keys, values = made("float32", (1, 1, 32), [700], size=size)
    q = torch.randn(1, 2, 1, 32)
    keys[:, :, -1] = segments[0].keys[:, :, -1] = q[:, 0] * size * 10
    check(few(q, 699, segments), naive(q, keys, values, 699), 1e-6 * max(1.0, size))


def test_what_is_not_a_number_shows() -> None:
    segments, _, _ = made("float32", (1, 1, 32), [700])
    segments[0].keys[0, 0, 650, 3] = torch.nan
    assert bool(few(torch.randn(1, 1, 1, 32), 699, segments).out.isnan().all())
    assert bool(few(torch.randn(1, 1, 1, 32), 640, segments).out.isfinite().all())


def test_a_key_or_scale_that_is_wrong_is_noticed() -> None:
    """What the comparisons above are worth."""
    torch.manual_seed(12)
    q = torch.randn(1, 2, 1, 64)
    segments, keys, values = made("int8", (1, 1, 64), [640])
    (segment,) = segments
    assert segment.key_scales is not None and segment.value_scales is not None
    expected = naive(q, keys, values, 639)
    check(few(q, 639, [segment]), expected, INTEGER_ERROR)
    wrong = (
        replace(segment, start=1),
        replace(segment, key_scales=segment.key_scales.roll(1, 2)),
        replace(segment, value_scales=segment.value_scales.roll(1, 2)),
        replace(segment, keys=segment.keys.roll(1, 2)),
    )
    for other in wrong:
        with pytest.raises(AssertionError):
            check(few(q, 639, [other]), expected, INTEGER_ERROR)


def test_comparisons_compute_by_themselves() -> None:
    assert {eager, flex} == _COMPARISONS


def test_which_attention_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(13)
    segments, _, _ = made("float32", (1, 2, 32), [600])
    calls = []
    monkeypatch.setattr(FewQueries, "finish", lambda self: calls.append(self) or (self.out.zero_(), self.lse.zero_()))
    mask, q = AttentionMask(), torch.randn(1, 4, 2, 32)
    positions = range(598, 600)
    attend(q, positions, segments, mask, sdpa)
    assert len(calls) == 1
    attend(q, positions, segments, mask, eager)
    many = torch.randn(1, 4, 300, 32)
    attend(many, range(300, 600), segments, mask, sdpa)
    narrow, _, _ = made("float32", (1, 2, 24), [600])
    attend(torch.randn(1, 4, 2, 24), positions, narrow, mask, sdpa)
    attend(q, range(4, 6), segments, AttentionMask(5), sdpa)  # two chunks
    monkeypatch.setattr(attending, "SMALLEST", 10**6)
    attend(q, positions, segments, mask, sdpa)
    monkeypatch.setattr(attending, "SMALLEST", 0)
    monkeypatch.setattr(products, "find_engine", lambda: None)
    attend(q, positions, segments, mask, sdpa)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smallest", [0, 602 * 64, 604 * 64, 605 * 64, 10**6])
def test_few_queries_get_what_each_gets_alone(
    dtype: torch.dtype, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where vector code begins to be worth having for some of them only, and in a chunk that begins late."""
    monkeypatch.setattr(attending, "SMALLEST", smallest)
    torch.manual_seed(16)
    segments = [
        KVSegment(torch.randn(1, 2, 303, 32).to(dtype), torch.randn(1, 2, 303, 32).to(dtype), start)
        for start in (0, 303)
    ]
    q = torch.randn(1, 5, 6, 32).to(dtype).transpose(1, 2)
    for mask in (AttentionMask(), AttentionMask(300)):
        together = attend(q, range(601, 606), segments, mask, sdpa)
        for i in range(5):
            last = KVSegment(segments[1].keys[:, :, : 299 + i], segments[1].values[:, :, : 299 + i], 303)
            alone = attend(q[:, :, i : i + 1], range(601 + i, 602 + i), [segments[0], last], mask, sdpa)
            assert torch.equal(alone, together[:, :, i : i + 1])


@pytest.mark.parametrize("chunk", [None, 200])
def test_it_is_what_other_attention_gives(chunk: int | None) -> None:
    """With segments that are garbage once the next one is asked for, and ones that no query sees."""
    torch.manual_seed(14)
    segments, _, _ = made("float32", (1, 2, 32), [70] * 10)
    q, positions, mask = torch.randn(1, 4, 3, 32), range(500, 503), AttentionMask(chunk)

    def passing() -> Iterator[KVSegment]:
        for segment in segments:
            if segment.start % 140:
                yield segment
                continue
            lent = KVSegment(segment.keys.clone(), segment.values.clone(), segment.start)
            yield lent
            lent.keys.fill_(torch.nan)
            lent.values.fill_(torch.nan)

    found = attention_state(q, positions, passing(), mask, sdpa)
    check(found, attention_state(q, positions, segments, mask, eager), 1e-6)
