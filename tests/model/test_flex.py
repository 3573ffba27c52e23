"""flex_attention as a backend, against the others; and all of its GPU path but the generated kernels: what is compiled,
how often, and what it is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

import model.kernels.flex
from model.kernels.attend import AttentionState, KVSegment, attend
from model.kernels.eager import eager
from model.kernels.flex import flex
from model.kernels.masks import AttentionMask
from model.kernels.registry import backend
from model.weights.loading import load_checkpoint
from support.cached_paths import CACHED_PATHS
from support.error_budget import difference
from support.paths import PATHS
from support.ranges import random_ranges
from support.toy_checkpoints import CHUNK, Toys

HEADS, HEAD_DIM = 6, 10
TEN_MILLION = 10_000_000
CACHED = {
    name: CACHED_PATHS[name]
    for name in (
        "prefill chunks smaller than an attention chunk",
        "prefill chunks that are no multiple",
        "token by token",
        "forked",
    )
}


def tensors(
    seed: int,
    t: int,
    s: int,
    *,
    batch: int = 1,
    kv_batch: int = 1,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries strided as the model's are, (B, T, H, D) in memory; keys and values head-major, parts of longer ones."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, t, HEADS, HEAD_DIM, generator=generator).transpose(1, 2)
    k, v = torch.randn(2, kv_batch, kv_heads, s + 3, HEAD_DIM, generator=generator)[:, :, :, 2 : s + 2]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def whole(states: Iterator[tuple[range, AttentionState]], shape: torch.Size) -> AttentionState:
    """The parts that a backend yields, which must not overlap, as one state; nothing is seen where there is no part."""
    out, lse = torch.full(shape, torch.nan), torch.full(shape[:3], torch.nan)
    for rows, part in states:
        here = slice(rows.start, rows.stop)
        assert part.lse.dtype == torch.float32 and part.lse.shape == part.out.shape[:3]
        assert lse[:, :, here].isnan().all(), "visited twice"
        out[:, :, here], lse[:, :, here] = part.out, part.lse
    left = lse.isnan()
    assert torch.equal(left, left[:1, :1].expand_as(left))
    return AttentionState(out.masked_fill(left[..., None], 0), lse.masked_fill(left, -torch.inf))


def check_equals_eager(seed: int, positions: range, keys: range, chunk: int | None, **options: Any) -> AttentionState:
    q, k, v = tensors(seed, len(positions), len(keys), **options)
    segment, mask = KVSegment(k, v, keys.start), AttentionMask(chunk)
    before = q.clone(), k.clone(), v.clone()
    got = whole(flex(q, positions, segment, mask), q.shape)
    ((_, expected),) = eager(q, positions, segment, mask)
    case = (seed, positions, keys, chunk, options)
    assert torch.allclose(got.lse, expected.lse, rtol=0, atol=2e-6), case  # -inf equals only -inf
    assert torch.allclose(got.out, expected.out, rtol=0, atol=2e-6), case  # eager's is 0 where nothing is seen
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True)), "inputs are the caller's"
    return got


@pytest.mark.parametrize("chunk", [None, 3, 7, 64])
@pytest.mark.parametrize("start", [0, TEN_MILLION])
def test_any_ranges_equal_eager(chunk: int | None, start: int) -> None:
    """Queries before, among and behind the keys, some or all of them seeing nothing."""
    generator = random.Random(0)
    unseen = 0
    for seed in range(60):
        queries, keys = random_ranges(generator)
        queries, keys = (range(x.start + start, max(x.stop, x.start + 1) + start) for x in (queries, keys))
        state = check_equals_eager(seed, queries, keys, chunk)
        unseen += int(state.lse.isneginf().any()) - int(state.lse.isneginf().all())
    assert unseen > 5, "some queries of a segment see nothing of it, others do"


@pytest.mark.parametrize("chunk", [None, 130])
def test_lengths_of_several_blocks(chunk: int | None) -> None:
    """Longer than the block size of 128, and exactly that."""
    generator = random.Random(1)
    for seed in range(8):
        t, s = generator.choice([1, 127, 128, 129, 300]), generator.choice([1, 128, 200, 384])
        offset = generator.randrange(400)
        check_equals_eager(seed, range(offset, offset + t), range(s), chunk)


@pytest.mark.parametrize(("batch", "kv_batch", "kv_heads"), [(1, 1, 1), (2, 2, 3), (3, 1, 2), (3, 1, 6)])
def test_groups_and_rows_that_share_keys(batch: int, kv_batch: int, kv_heads: int) -> None:
    for seed, (t, s) in enumerate([(1, 30), (16, 24), (40, 40)]):
        for chunk in (None, 7):
            check_equals_eager(
                seed, range(s - t + 5, s + 5), range(s), chunk, batch=batch, kv_batch=kv_batch, kv_heads=kv_heads
            )


@pytest.mark.parametrize("chunk", [None, 7])
def test_decoding_equals_sdpa(chunk: int | None) -> None:
    """One query over segments of any lengths, of which a chunked layer sees the newest only."""
    q, k, v = tensors(0, 1, 40)
    segments = [KVSegment(k[:, :, a:b], v[:, :, a:b], TEN_MILLION + a) for a, b in ((0, 21), (21, 39), (39, 40))]
    now = range(TEN_MILLION + 39, TEN_MILLION + 40)
    results = [attend(q, now, segments, AttentionMask(chunk), which) for which in (flex, backend("sdpa"))]
    assert torch.allclose(*results, rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 7])
def test_segments_that_no_query_sees_yield_nothing(chunk: int | None) -> None:
    q, k, v = tensors(3, 3, 5)
    unseen = [18, 40, TEN_MILLION] + ([0, 8] if chunk else [])
    for start in unseen:
        assert not list(flex(q, range(15, 18), KVSegment(k, v, start), AttentionMask(chunk)))
    for empty in (KVSegment(k[:, :, :0], v[:, :, :0], 15), KVSegment(k[:, :, :0], v[:, :, :0], 0)):
        assert not list(flex(q, range(15, 18), empty, AttentionMask(chunk)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    for seed, positions in enumerate([range(16, 40), range(2, 4)]):
        for chunk in (None, 7):
            check_equals_eager(seed, positions, range(40), chunk, dtype=dtype)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("scores", [1, 4 * HEADS * 50 * 7, 4 * HEADS * 50 * 50])
def test_pieces_of_bounded_scores(chunk: int | None, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one query, of seven, and of all: equal to the whole, and pieces that see nothing are left out."""
    made: list[int] = []
    uncompiled = model.kernels.flex._uncompiled

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        made.append(4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return uncompiled(q, k, v, **options)

    monkeypatch.setattr(model.kernels.flex, "MAX_SCORE_BYTES", scores)
    monkeypatch.setattr(model.kernels.flex, "_uncompiled", recorded)
    check_equals_eager(0, range(50), range(50), chunk)
    at_once = {1: 1, 4 * HEADS * 50 * 7: 7}.get(scores, 50)
    assert len(made) == -(-50 // at_once) and max(made) == 4 * HEADS * 50 * at_once
    made.clear()
    check_equals_eager(0, range(70, 120), range(50, 100), chunk)
    seeing = 50 if chunk is None else 42  # positions 70 to 111; from 112 on it is another chunk than the keys'
    assert len(made) == -(-seeing // at_once)


def test_lists_of_blocks_stay_bounded_on_a_gpu() -> None:
    assert model.kernels.flex._queries_at_once("cuda", 40, 8192) == 2**20 // 64 * 128
    for s in (0, 1, 128, 129, TEN_MILLION, 2**30):
        at_once = model.kernels.flex._queries_at_once("cuda", 40, s)
        assert at_once % 128 == 0 and at_once >= 128
        assert at_once // 128 * -(-s // 128) <= model.kernels.flex.MAX_BLOCKS or at_once == 128


@pytest.fixture
def model_with_flex(toys: Toys) -> Callable[[str, float], Any]:
    def make(name: str, std: float) -> Any:
        transformer = load_checkpoint(toys(name, std).folder, dtype=torch.float32)
        transformer.backend = flex
        return transformer

    return make


@pytest.mark.parametrize(
    ("name", "std", "paths"),
    [
        ("scout", 0.25, PATHS | CACHED),
        ("maverick", 0.02, PATHS),
        pytest.param("one_kv_head", 0.25, PATHS, marks=pytest.mark.matrix),
    ],
)
def test_whole_models_by_every_path(
    toys: Toys,
    model_with_flex: Callable[[str, float], Any],
    name: str,
    std: float,
    paths: dict[str, Callable[[Any, Tensor], Tensor]],
) -> None:
    """A full forward, chunked prefill, token by token, forks: the logits of `transformers`, and of sdpa."""
    toy, ours = toys(name, std), model_with_flex(name, std)
    ids, expected = toy.case(1, 2 * CHUNK + 1)
    sdpa = load_checkpoint(toy.folder, dtype=torch.float32, attention="sdpa")
    wrong = {}
    for path_name, path in paths.items():
        logits = path(ours, ids)
        for other_name, other in (("transformers", expected), ("sdpa", path(sdpa, ids))):
            error = difference(logits, other)
            if not error <= toy.limit(1, 2 * CHUNK + 1) * (1 if other is expected else 2):  # sdpa errs as well
                wrong[path_name, other_name] = error
    assert not wrong


def test_rows_of_a_batch(toys: Toys, model_with_flex: Callable[[str, float], Any]) -> None:
    toy = toys("scout", 0.25)
    ids, expected = toy.case(2, 33)
    for path in (PATHS["full"], CACHED["prefill chunks that are no multiple"]):
        assert difference(path(model_with_flex("scout", 0.25), ids), expected) <= toy.limit(2, 33)


class Compiler:
    """In the place of the compiler's code generation: runs what was traced, and counts how often there was a need."""

    def __init__(self) -> None:
        self.compiled = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """The GPU path on the CPU: traced by the real tracer, with its guards."""
    counter, real = Compiler(), torch.compile
    torch._dynamo.reset()
    model.kernels.flex._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=counter, **options))
    model.kernels.flex._compiled()
    monkeypatch.undo()
    monkeypatch.setattr(model.kernels.flex, "_uncompiled", model.kernels.flex._within_limit)
    yield counter
    torch._dynamo.reset()
    model.kernels.flex._compiled.cache_clear()


def step(positions: range, segment: range, chunk: int | None) -> None:
    """One forward's attention of one layer to one segment; nothing if it is not seen."""
    check_equals_eager(len(positions), positions, segment, chunk)


def test_steps_of_a_run_are_compiled_a_few_times_only(compiler: Compiler) -> None:
    """Reading of 15 attention chunks, each step at other positions, is compiled for each kind of layer and for nothing
    else; then a question, and an answer of many tokens, for the few lengths that the compiler takes for constants."""
    size = 160
    with torch.inference_mode():
        for start in range(0, 15 * size, size):
            for chunk in (None, size):
                step(range(start, start + size), range(start, start + size), chunk)
        assert (compiler.compiled, compiler.calls) == (2, 30)
        for start in range(0, 14 * size, size):  # older keys, of another length
            step(range(15 * size, 16 * size), range(start, start + 2 * size), None)
        assert (compiler.compiled, compiler.calls) == (3, 30 + 14)
        question = range(16 * size, 16 * size + 50)
        answer = (*range(question.stop, 18 * size + 9, 7), 17 * size)  # some of its tokens, one the first of a chunk
        compiler.calls = 0
        for positions in (question, *(range(position, position + 1) for position in answer)):
            step(positions, range(positions.start // size * size, positions.stop), size)
            step(positions, range(positions.start - 600, positions.start - 200), None)
            step(positions, range(positions.start - 200, positions.stop), None)
        assert compiler.calls == 3 * (1 + len(answer)) and 3 < compiler.compiled <= 12


def test_the_limit_of_variants_is_an_error(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the usual silent fall back to what is not compiled, which would hold all scores in memory."""
    monkeypatch.setattr(model.kernels.flex, "MAX_VARIANTS", 2)
    for chunk in (None, 3):
        step(range(9), range(9), chunk)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        step(range(8, 9), range(9), 3)
    assert (compiler.compiled, compiler.calls) == (2, 2)


def test_compiled_rows_that_share_keys(compiler: Compiler) -> None:
    for kv_heads in (2, 6):
        check_equals_eager(0, range(9, 18), range(18), None, batch=3, kv_batch=1, kv_heads=kv_heads)
    assert (compiler.compiled, compiler.calls) == (2, 2)


def test_layers_and_older_segments_share_block_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = AttentionMask.block_mask
    monkeypatch.setattr(AttentionMask, "block_mask", lambda *args: made.append(args[1:3]) or original(*args))
    model.kernels.flex._block_mask.cache_clear()
    for layer in range(3):
        for position in (100, 200, TEN_MILLION):
            for start in range(0, 100, 25):
                check_equals_eager(layer, range(position, position + 5), range(start, start + 25), None)
            check_equals_eager(layer, range(position, position + 5), range(position, position + 5), 10)
    assert made == [(range(25, 30), range(25)), (range(5), range(5))]


def test_without_auxiliary_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.8 is asked for the log-sum-exp in its own way."""
    request, uncompiled = getattr(torch_flex, "AuxRequest", None), model.kernels.flex._uncompiled

    def older(*args: Any, return_lse: bool, **options: Any) -> tuple[Tensor, Tensor]:
        assert return_lse
        if request is None:
            return uncompiled(*args, **options, return_lse=True)
        out, found = uncompiled(*args, **options, return_aux=request(lse=True))
        return out, found.lse

    monkeypatch.setattr(model.kernels.flex, "_uncompiled", older)
    monkeypatch.delattr(torch_flex, "AuxRequest", raising=False)
    check_equals_eager(0, range(9, 18), range(12), 7)
