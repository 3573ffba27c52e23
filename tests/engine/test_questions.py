"""Many questions, several at a time: each answer equals that of the question alone, whatever shares its forwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import l4ctx.engine.questions
import model.attention
from cache.fork import ForkedKVCache
from cache.hybrid import HybridKVCache
from cache.residency import Residency, fork_bytes
from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.engine.generate import generate
from l4ctx.engine.loop_guard import LoopGuard
from l4ctx.engine.prefill import prefill
from l4ctx.engine.questions import Asked, answer_rounds
from l4ctx.engine.row import Drafts, Row
from model.simd.products import FEW_ROWS
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.cached_paths import SavedRows, new_cache, scratch
from support.drafting import Prompted, ended
from support.quantized_checkpoints import SIZES
from support.toy_checkpoints import CHUNK, SCOUT, VOCABULARY, Kind, Toys, write_kind

DOCUMENTS = 5 * CHUNK + 4
LENGTH = DOCUMENTS + 64


@dataclass(frozen=True)
class Ask:
    """A question, and how its answer is generated."""

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()

    @property
    def room(self) -> int:
        return len(self.ids) + self.max_new_tokens


def asks(count: int, seed: int = 0) -> list[Ask]:
    """Questions of one token and more, some longer than an attention chunk; short and long answers, some sampled."""
    source = random.Random(seed)
    return [
        Ask(
            [source.randrange(VOCABULARY) for _ in range(source.choice((1, 2, 3, CHUNK, 2 * CHUNK + 3)))],
            source.choice((1, 2, 5, 14)),
            source.choice((Sampling(), Sampling(), Sampling(temperature=1.3, top_p=0.9, seed=source.randrange(100)))),
        )
        for _ in range(count)
    ]


def documents_of(model: Transformer, **where: Any) -> HybridKVCache:
    """A cache with some documents, in blocks of two chunks: two rows are sealed and one is open."""
    ids = random.Random(7).choices(range(VOCABULARY), k=DOCUMENTS)
    cache = new_cache(model, torch.empty(1, LENGTH), block_chunks=2, segment_chunks=1, **where)
    list(prefill(model, cache, ids, prefill_chunk_size=2 * CHUNK))
    return cache


def alone(model: Transformer, documents: HybridKVCache, ask: Ask, stops: frozenset[int]) -> tuple[list[int], str]:
    """The answer to one question, as `l4ctx ask` generates it."""
    cache = documents.fork()
    list(prefill(model, cache, ask.ids[:-1]))
    return ended(generate(model, row_of(ask, cache, stops)))


def row_of(ask: Ask, cache: Any, stops: frozenset[int], drafts: Drafts | None = None) -> Row:
    return Row(
        cache,
        ask.ids[-1],
        max_new_tokens=ask.max_new_tokens,
        stop_tokens=stops,
        sampling=ask.sampling,
        guard=LoopGuard(),
        drafts=drafts,
    )


def together(
    model: Transformer,
    documents: HybridKVCache,
    questions: list[Ask],
    stops: frozenset[int],
    *,
    rows: int,
    step_tokens: int = 64,
    watch: Callable[[], object] = lambda: None,
    drafts: Sequence[Drafts] | None = None,
) -> tuple[list[tuple[list[int], str]], list[int]]:
    """The answers in the order of the questions, and the numbers of the questions in the order of completion."""

    def begin(number: int, cache: ForkedKVCache, token: int) -> Row:
        ask = questions[number]
        assert cache.offset == documents.offset + len(ask.ids) - 1 and token == ask.ids[-1]
        return row_of(ask, cache, stops, drafts and drafts[number])

    asked = (Asked(number, ask.ids, ask.room) for number, ask in enumerate(questions))
    found, order, tokens = {}, [], 0
    for done in answer_rounds(model, documents, asked, begin, rows=rows, step_tokens=step_tokens):
        tokens += done.new_tokens
        watch()
        for one in done.answered:
            assert one.question not in found and one.row.stop_reason is not None
            found[one.question] = (list(one.ids), str(one.row.stop_reason))
            order.append(one.question)
    assert tokens == sum(len(ids) for ids, _ in found.values())
    return [found[number] for number in range(len(questions))], order


@pytest.fixture
def scout(toys: Toys) -> Transformer:
    return load_checkpoint(toys("scout", 0.25).folder, dtype=torch.float32)


STOPS = frozenset(range(0, VOCABULARY, 12))


@pytest.mark.parametrize("name", ["scout", "maverick", "nope_first", "rope_longrope_long"])
def test_answers_equal_those_of_single_questions(toys: Toys, name: str) -> None:
    """Of several lengths at several positions, greedy and sampled, in rows that end at different times."""
    model = load_checkpoint(toys(name, 0.25).folder, dtype=torch.float32)
    documents, questions = documents_of(model), asks(9)
    expected = [alone(model, documents, ask, STOPS) for ask in questions]
    assert {reason for _, reason in expected} == {"stop", "length"} and len({len(ids) for ids, _ in expected}) > 3
    held = documents.held()
    for rows, step_tokens in ((1, 64), (3, 64), (4, 5), (40, 1)) if name == "scout" else ((4, 5), (40, 64)):
        found, order = together(model, documents, questions, STOPS, rows=rows, step_tokens=step_tokens)
        assert found == expected, (rows, step_tokens)
        assert rows > 1 or order == list(range(9))
        assert documents.offset == DOCUMENTS and documents.held() == held


def prompted(answers: list[tuple[list[int], str]], wrong: float) -> list[Prompted]:
    """Drafts of these answers, each token wrong with this chance."""
    return [Prompted(answer, wrong, 100, VOCABULARY) for answer, _ in answers]


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_drafts_change_no_answer_of_several(scout: Transformer, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """Across chunk and block ends, stops and seeds; and they make no forward longer than FEW_ROWS."""
    documents, questions, counts = documents_of(scout), asks(9, seed=6), list[list[int]]()
    expected = [alone(scout, documents, ask, STOPS) for ask in questions]
    original = scout.forward_ragged

    def counted(ids: Any, caches: Any, logits: Any, observers: Any) -> Any:
        counts.append([len(some) for some, wanted in zip(ids, logits, strict=True) if wanted])
        return original(ids, caches, logits, observers)

    monkeypatch.setattr(scout, "forward_ragged", counted)
    for rows, step_tokens in ((1, 64), (3, 6), (4, 64), (9, 64)):
        counts.clear()
        drafts = prompted(expected, wrong)
        found, _ = together(scout, documents, questions, STOPS, rows=rows, step_tokens=step_tokens, drafts=drafts)
        assert found == expected, (rows, step_tokens)
        assert sum(draft.proposed for draft in drafts) > 0
        assert all(sum(count) <= max(len(count), min(FEW_ROWS, step_tokens)) for count in counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_change_no_bit_where_rows_do_not_depend_on_each_other(tmp_path: Path, dtype: torch.dtype) -> None:
    """Vector code computes each token of up to FEW_ROWS by itself: rounding to bfloat16 changes no answer either."""
    if find_spec("llvmlite") is None:
        pytest.skip("without llvmlite, PyTorch computes steps, and rounds by their number of tokens")
    model = load_checkpoint(write_kind(tmp_path, "few", Kind(SIZES | SCOUT), 0.25, seed=3).folder, dtype=dtype)
    documents = documents_of(model)
    questions = [replace(ask, ids=ask.ids[:1]) for ask in asks(12, seed=8)]  # no question is read beside answers
    expected, _ = together(model, documents, questions, STOPS, rows=1)
    for rows, wrong in ((1, 0.3), (2, 0.0), (3, 0.3), (7, 0.3), (8, 0.0)):
        drafts = prompted(expected, wrong)
        assert together(model, documents, questions, STOPS, rows=rows, drafts=drafts)[0] == expected
        assert sum(draft.proposed for draft in drafts) > 0


def test_no_documents_at_all(scout: Transformer) -> None:
    """The first forward then begins several sequences at position 0."""
    documents, questions = new_cache(scout, torch.empty(1, 64)), asks(5, seed=3)
    expected = [alone(scout, documents, ask, STOPS) for ask in questions]
    assert together(scout, documents, questions, STOPS, rows=4)[0] == expected


@pytest.mark.parametrize(
    ("kv_dtype", "host_rows"),
    [("float32", None), ("float32", 1), ("float32", 0), ("bfloat16", 0), ("fp8", 1), ("int8", 0), ("int8", None)],
)
def test_every_tier_and_storage_type(scout: Transformer, kv_dtype: str, host_rows: int | None) -> None:
    """Keys and values of the documents in memory and in a scratch file. Rows write nothing there, and pack nothing: no
    answer reaches the next block."""
    layout = replace(
        new_cache(scout, torch.empty(1, LENGTH), block_chunks=5, segment_chunks=1).layout, kv_dtype=kv_dtype
    )
    questions = asks(6, seed=5)
    with scratch() as file:
        documents = HybridKVCache(
            scout.config, length=LENGTH, layout=layout, rows=file, residency=Residency(host_rows=host_rows)
        )
        ids = random.Random(7).choices(range(VOCABULARY), k=DOCUMENTS)
        list(prefill(scout, documents, ids, prefill_chunk_size=2 * CHUNK))
        expected = [alone(scout, documents, ask, STOPS) for ask in questions]
        written = file._end
        assert together(scout, documents, questions, STOPS, rows=3)[0] == expected
        assert file._end == written


def test_nothing_is_written_into_a_context(scout: Transformer, tmp_path: Any) -> None:
    saved = SavedRows(tmp_path)
    documents, questions = documents_of(scout, rows=saved), asks(6, seed=5)
    before = list(saved.written)
    together(scout, documents, questions, STOPS, rows=3)
    assert saved.written == before == [0, 1]


def test_no_more_rows_than_asked_for_and_no_longer_forwards(
    scout: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are full while questions are left. A forward has at most so many tokens, or one for each row."""
    documents, questions, counts = documents_of(scout), asks(9, seed=2), []
    original = scout.forward_ragged

    def counted(ids: Any, caches: Any, logits: Any, observers: Any) -> Any:
        assert len({id(cache) for cache in caches}) == len(caches)
        counts.append([len(some) for some in ids])
        return original(ids, caches, logits, observers)

    monkeypatch.setattr(scout, "forward_ragged", counted)
    together(scout, documents, questions, STOPS, rows=4, step_tokens=6)
    assert all(len(count) <= 4 and sum(count) <= 6 for count in counts)
    assert any(sum(count) == 6 and 1 in count for count in counts), "no question is read beside answers"
    counts.clear()
    together(scout, documents, questions, STOPS, rows=9, step_tokens=200)
    assert len(counts[0]) + sum(1 for ask in questions if len(ask.ids) == 1) >= 9
    assert len(counts) == max(len(alone(scout, documents, ask, STOPS)[0]) for ask in questions) + 1


def test_memory_stays_within_the_plan(scout: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every fork, at every step: what `fork_bytes` says for it."""
    documents, questions, forks = documents_of(scout), asks(9, seed=4), list[tuple[ForkedKVCache, int]]()

    def fork(base: HybridKVCache, room: int) -> ForkedKVCache:
        forks.append((ForkedKVCache(base, room), room))
        return forks[-1][0]

    def watch() -> None:
        assert all(cache.nbytes <= fork_bytes(cache.layout, room) for cache, room in forks)

    monkeypatch.setattr(l4ctx.engine.questions, "continuation", fork)
    before = documents.held()
    together(scout, documents, questions, STOPS, rows=3, watch=watch)
    assert len(forks) == 9 and documents.held() == before


def test_questions_are_taken_when_their_turn_comes(scout: Transformer) -> None:
    """A hundred thousand questions are not encoded beforehand."""
    documents, taken = documents_of(scout), []

    def asked() -> Iterator[Asked[int]]:
        for number in range(100_000):
            taken.append(number)
            yield Asked(number, [5, number % VOCABULARY], 4)

    def begin(number: int, cache: ForkedKVCache, token: int) -> Row:
        return Row(cache, token, max_new_tokens=2, stop_tokens=frozenset())

    rounds = answer_rounds(scout, documents, asked(), begin, rows=5, step_tokens=64)
    answered = sum(len(next(rounds).answered) for _ in range(9))
    assert answered == 15 and len(taken) == 15


@contextmanager
def wrong_temperatures(patch: pytest.MonkeyPatch, *, by: int) -> Iterator[None]:
    """Queries of several sequences get the temperature of the token `by` places before."""
    original = model.attention.Step.at

    def at(*arguments: Any) -> Any:
        step = original(*arguments)
        return step._replace(temperature=step.temperature.roll(by)) if step.temperature is not None else step

    with patch.context() as wrong:
        wrong.setattr(model.attention.Step, "at", at)
        yield


def test_a_wrong_temperature_row_is_noticed(scout: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions of very different lengths, so that their answers lie in different steps of the temperature."""
    scout.config = replace(scout.config, attn_scale=10.0)
    documents = documents_of(scout)
    questions = [Ask([5] * length, 12) for length in (1, 30, 12, 45)]
    expected = [alone(scout, documents, ask, frozenset()) for ask in questions]
    logits: list[Tensor] = []
    original = scout.forward_ragged

    def kept(ids: Any, caches: Any, wanted: Any, observers: Any) -> Any:
        found = original(ids, caches, wanted, observers)
        logits.extend(found or ())
        return found

    monkeypatch.setattr(scout, "forward_ragged", kept)

    def run() -> Tensor:
        logits.clear()
        found, _ = together(scout, documents, questions, frozenset(), rows=4, step_tokens=200)
        answers.append(found)
        return torch.cat(logits[:8])

    answers: list[Any] = []
    right = run()
    with wrong_temperatures(monkeypatch, by=0):
        assert torch.equal(run(), right)
    with wrong_temperatures(monkeypatch, by=1):
        wrong = run()
    assert answers[0] == answers[1] == expected != answers[2]
    assert (wrong - right).abs().max() > 1e-3 * right.abs().max()
