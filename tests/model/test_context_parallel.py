"""Context parallelism with ranks as threads: what they compute, what each holds, and what they exchange.

With processes, and beside tensor parallelism: tests/model/test_parallel.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from cache.context import ContextKVCache
from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import KVBytes, Residency, held_bytes
from l4ctx.engine.generate import generate
from l4ctx.engine.row import Row
from model import context_attention, context_parallel
from model.context_attention import ContextAttention
from model.context_division import ContextRank, Exchanged, exchanged
from model.context_parallel import ContextTransformer
from model.kernels.attend import AttentionState
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.rank_threads import ThreadContextExchange, Together
from support.toy_checkpoints import CHUNK, DIVISIBLE, SCOUT, VOCABULARY, Kind, write_kind

IDS = random.Random(3).choices(range(VOCABULARY), k=11 * CHUNK + 3)
KIND = Kind(DIVISIBLE | SCOUT | {"no_rope_layers": [1, 0, 1, 0]})
LIMIT = 1e-4
PREFILL_AND_DECODE = [8 * CHUNK, 10 * CHUNK, *range(10 * CHUNK + 1, len(IDS) + 1)]
CUTS = {
    "many attention chunks, then token by token over a boundary": PREFILL_AND_DECODE,
    "one attention chunk": [CHUNK, CHUNK + 1, CHUNK + 2],
    "less than one": [CHUNK - 1, CHUNK, CHUNK + 1],
    "ends behind a boundary": [3 * CHUNK + 1, 3 * CHUNK + 2],
    "parts of attention chunks": [CHUNK // 2, 2 * CHUNK + 3, 5 * CHUNK - 1, 9 * CHUNK + 1, 9 * CHUNK + 2],
    "a whole prompt": [len(IDS)],
}
T = TypeVar("T")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    write_kind(root / "stored", "toy", KIND, 0.2, seed=11)
    return root / "stored"


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load_checkpoint(folder, dtype=torch.float32)


def layout(model: Transformer, length: int) -> StoreLayout:
    """Blocks of two attention chunks, in two segments."""
    return StoreLayout(model.config, length, "float32", "float32", 1, 2 * CHUNK, CHUNK)


def fed(model: Transformer, cache: HybridKVCache | ContextKVCache, cuts: Sequence[int]) -> Tensor:
    found = [model(torch.tensor([IDS[cache.offset : cut]]), cache, logits="all") for cut in cuts]
    return torch.cat(found, 1)[0]


def alone(model: Transformer, cuts: Sequence[int]) -> Tensor:
    return fed(model, HybridKVCache(model.config, length=cuts[-1], layout=layout(model, cuts[-1])), cuts)


def rank_cache(model: Transformer, rank: ContextRank, length: int, **options: Any) -> ContextKVCache:
    own = rank.own_length(length, CHUNK)
    return ContextKVCache(HybridKVCache(model.config, length=own, layout=layout(model, own), **options), rank, length)


def each(folder: Path, count: int, length: int, work: Callable[[ContextTransformer, ContextKVCache], T]) -> list[T]:
    """What `work` returns on each rank."""

    def on_rank(exchange: ThreadContextExchange) -> T:
        model = load_checkpoint(folder, dtype=torch.float32, context=exchange)
        assert isinstance(model, ContextTransformer)
        return work(model, rank_cache(model, exchange.rank, length))

    return Together(count).run_context(on_rank)


def together(folder: Path, count: int, cuts: Sequence[int]) -> list[Tensor]:
    return each(folder, count, cuts[-1], lambda model, cache: fed(model, cache, cuts))


def always(are_queries: bool) -> Callable[..., Exchanged]:
    return lambda *arguments: exchanged(*arguments)._replace(are_queries=are_queries)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_compute_what_one_process_computes(
    folder: Path, model: Transformer, count: int, cuts: Sequence[int]
) -> None:
    expected = alone(model, cuts)
    assert expected.std() > 0.1
    first, *others = together(folder, count, cuts)
    assert (first - expected).abs().max() <= LIMIT
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("are_queries", [True, False])
def test_whatever_travels_the_result_is_the_same(
    folder: Path, model: Transformer, monkeypatch: pytest.MonkeyPatch, are_queries: bool
) -> None:
    cuts = [CHUNK // 2, 3 * CHUNK + 2, 9 * CHUNK, 10 * CHUNK, 10 * CHUNK + 1]
    expected = together(folder, 4, cuts)[0]
    monkeypatch.setattr(context_attention, "exchanged", always(are_queries))
    found = together(folder, 4, cuts)[0]
    assert not torch.equal(found, expected)  # both kinds were in use
    assert (found - alone(model, cuts)).abs().max() <= LIMIT


def test_bytes_sent_are_those_of_the_closed_form(folder: Path, model: Transformer) -> None:
    cuts = PREFILL_AND_DECODE

    def work(model: ContextTransformer, cache: ContextKVCache) -> list[int]:
        exchange, sent = model.exchange, []
        assert isinstance(exchange, ThreadContextExchange)
        for cut in cuts:
            before = exchange.sent_bytes
            model(torch.tensor([IDS[cache.offset : cut]]), cache, logits="none" if cut % 2 else "last")
            sent.append(exchange.sent_bytes - before)
        return sent

    config, count = model.config, 4
    nope, start, kinds = [n for n in range(config.num_hidden_layers) if not config.uses_rope(n)], 0, set()
    sent = [sum(sizes) for sizes in zip(*each(folder, count, cuts[-1], work), strict=True)]
    for cut, size in zip(cuts, sent, strict=True):
        expected = 0 if cut % 2 else config.vocab_size * 4 * (count - 1)
        for layer in nope:
            is_last = layer == config.num_hidden_layers - 1
            positions = range(start, cut) if not is_last else range(cut - (cut % 2 == 0), cut)
            travels = exchanged(config, count, list(ContextRank(0, count).pieces(positions, CHUNK)), 4)
            expected += travels.num_bytes
            kinds.add((travels.are_queries, travels.num_bytes > 0))
        assert size == expected, cut
        start = cut
    assert {(True, True), (False, True)} <= kinds


def test_each_rank_holds_the_blocks_of_its_own_chunks(folder: Path, model: Transformer) -> None:
    """As many tokens as each other, one window a RoPE layer, and what the closed form says, to the byte."""
    count, length = 4, 16 * CHUNK

    def work(model: ContextTransformer, cache: ContextKVCache) -> tuple[KVBytes, KVBytes, int]:
        model(torch.tensor([(IDS * 2)[:length]]), cache, logits="none")
        return cache.held(), held_bytes(cache.own.layout, cache.own.offset), cache.own.offset

    whole = HybridKVCache(model.config, length=length, layout=layout(model, length))
    model(torch.tensor([(IDS * 2)[:length]]), whole, logits="none")
    for held, expected, offset in each(folder, count, length, work):
        assert held == expected and offset == length // count
        assert held.nope * count == whole.held().nope and held.rope_windows == whole.held().rope_windows


@pytest.mark.parametrize(("kv_dtype", "limit"), [("float32", LIMIT), ("int8", 0.02)])
def test_blocks_on_disk_are_exchanged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str, limit: float
) -> None:
    """The same from either exchange, but for a key that is rounded to the next code."""
    cuts = [5 * CHUNK, 9 * CHUNK, 9 * CHUNK + 2]
    found = []
    for are_queries in (True, False):
        monkeypatch.setattr(context_attention, "exchanged", always(are_queries))

        def on_rank(exchange: ThreadContextExchange) -> tuple[Tensor, int]:
            model = load_checkpoint(folder, dtype=torch.float32, context=exchange)
            own = exchange.rank.own_length(cuts[-1], CHUNK)
            with closing(Scratch(tmp_path)) as rows:
                shapes = replace(layout(model, own), kv_dtype=kv_dtype)
                cache = HybridKVCache(model.config, length=own, layout=shapes, rows=rows, residency=Residency(0))
                logits = fed(model, ContextKVCache(cache, exchange.rank, cuts[-1]), cuts)
                return logits, cache.held().nope_disk

        results = Together(2).run_context(on_rank)
        assert all(on_disk for _, on_disk in results)
        found.append(results[0][0])
    assert (found[0] - found[1]).abs().max() <= limit


def test_images_enter_as_embeddings(folder: Path, model: Transformer) -> None:
    embeddings = torch.randn(1, 3 * CHUNK + 2, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    cache = HybridKVCache(model.config, length=30)
    expected = model(embeddings.clone(), cache)
    for found in each(folder, 2, 30, lambda model, cache: model(embeddings.clone(), cache)):
        assert (found - expected).abs().max() <= LIMIT


class WrongDrafts:
    """Proposes what comes next, with an error in every third proposal."""

    def __init__(self, right: Sequence[int]) -> None:
        self.right, self.done, self.proposed = list(right), 0, 0

    def propose(self, room: int, rows: int) -> list[int]:
        self.proposed += 1
        draft = self.right[self.done : self.done + min(room, 4)]
        if draft and self.proposed % 3 == 0:
            draft[-1] = (draft[-1] + 1) % VOCABULARY
        return draft

    def observe(self, tokens: Sequence[int]) -> None:
        self.done += len(tokens)


def test_drafts_are_taken_back(folder: Path, model: Transformer) -> None:
    """Over the ends of attention chunks, where the owner changes."""
    start, more = 5 * CHUNK - 4, 3 * CHUNK
    options = {"max_new_tokens": more, "stop_tokens": frozenset[int]()}

    def answer(model: Transformer, cache: Any, drafts: WrongDrafts | None = None) -> list[int]:
        model(torch.tensor([IDS[:start]]), cache, logits="none")
        return list(generate(model, Row(cache, IDS[start], drafts=drafts, **options)))

    expected = answer(model, HybridKVCache(model.config, length=start + more))
    assert len(set(expected)) > 4
    for found in each(folder, 3, start + more, lambda model, cache: answer(model, cache, WrongDrafts(expected))):
        assert found == expected

    def steps(model: Transformer, cache: ContextKVCache) -> list[Tensor]:
        model(torch.tensor([IDS[:start]]), cache, logits="none")
        drafted = model(torch.tensor([[*IDS[start : start + 2], 7]]), cache)
        cache.rewind(start + 1)
        single = model(torch.tensor([IDS[start + 1 : start + 2]]), cache)
        return [drafted[:, 1], single[:, 0]]

    for drafted, single in each(folder, 3, start + more, steps):
        assert (drafted - single).abs().max() <= LIMIT


def test_an_interrupt_finds_all_tokens_or_none(folder: Path) -> None:
    """The offset of the whole is the truth: own tokens that a commit did not reach are committed when next needed."""

    def work(model: ContextTransformer, cache: ContextKVCache) -> None:
        model(torch.tensor([IDS[: 2 * CHUNK]]), cache, logits="none")
        own = cache.own
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(own, "advance", interrupted)
            if cache.rank.number == 1:
                with pytest.raises(KeyboardInterrupt):
                    model(torch.tensor([IDS[2 * CHUNK : 3 * CHUNK]]), cache, logits="none")
            else:
                model(torch.tensor([IDS[2 * CHUNK : 3 * CHUNK]]), cache, logits="none")
        assert cache.offset == 3 * CHUNK
        assert cache.own.offset == cache.rank.tokens_before(3 * CHUNK, CHUNK)

    def interrupted(tokens: int) -> None:
        raise KeyboardInterrupt

    each(folder, 2, 4 * CHUNK, work)


def sees_a_later_chunk(patch: pytest.MonkeyPatch) -> None:
    def visited(self: Any, q: Tensor, visits: Sequence[context_attention.Visit], segments: Any) -> AttentionState:
        stop = max(visit.stop for visit in visits)
        return right(self, q, [visit._replace(stop=stop) for visit in visits], segments)

    right = ContextAttention._visited
    patch.setattr(ContextAttention, "_visited", visited)


def forgets_the_log_sum_exp(patch: pytest.MonkeyPatch) -> None:
    def mean(states: Sequence[AttentionState]) -> AttentionState:
        return AttentionState(torch.stack([state.out for state in states]).mean(0), states[0].lse)

    patch.setattr(context_attention, "merged", mean)


def takes_another_rank_for_the_owner(patch: pytest.MonkeyPatch) -> None:
    right = ContextRank.owner
    patch.setattr(ContextRank, "owner", lambda self, chunk: (right(self, chunk) + (self.number == 1)) % self.count)


def tunes_by_own_positions(patch: pytest.MonkeyPatch) -> None:
    right = context_parallel.query_temperature
    patch.setattr(
        context_parallel, "query_temperature", lambda config, here, device: right(config, range(len(here)), device)
    )


@pytest.mark.parametrize(
    "fault", [sees_a_later_chunk, forgets_the_log_sum_exp, takes_another_rank_for_the_owner, tunes_by_own_positions]
)
def test_faults_do_not_pass(
    folder: Path, model: Transformer, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    cuts = [4 * CHUNK, 8 * CHUNK + 1, 8 * CHUNK + 2]
    expected = alone(model, cuts)
    fault(monkeypatch)
    try:
        found = together(folder, 2, cuts)[0]
    except (AssertionError, RuntimeError):
        return
    assert (found - expected).abs().max() > 10 * LIMIT
