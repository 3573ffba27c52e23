"""Drafts never change an answer: right or wrong, across chunks and blocks, with stops inside, in any tier."""

from __future__ import annotations

import itertools
import math
import random
from array import array
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import l4ctx.engine.row
from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.residency import Residency
from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.drafts.drafter import MOST_TOKENS, Drafter
from l4ctx.drafts.index import IndexedText
from l4ctx.drafts.order import text_order
from l4ctx.engine import loop_guard
from l4ctx.engine.loop_guard import LoopGuard
from l4ctx.engine.prefill import as_batch
from l4ctx.engine.row import Row
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.drafting import Chain, Prompted, answered
from support.toy_checkpoints import CHUNK, VOCABULARY, Toys

PROMPT = [5, 61, 3, 3, 90, 17, 42, 8, 11, 2, 77]
NEW_TOKENS = 4 * CHUNK + 3  # over the ends of chunks and of blocks of two
DRAFTS = {"right": (0.0, 100), "wrong": (1.0, 100), "mixed": (0.3, 100), "mixed and short": (0.3, 2)}


def prompted(answer: list[int], name: str) -> Prompted:
    wrong, most = DRAFTS[name]
    return Prompted(answer, wrong, most, VOCABULARY)


@pytest.fixture(scope="module")
def scout(toys: Toys) -> Transformer:
    return load_checkpoint(toys("scout", 0.25).folder, dtype=torch.float32)


def same_state(model: Transformer, a: HybridKVCache, b: HybridKVCache) -> bool:
    """Both go on alike from here: nothing of a draft that was not accepted is left."""
    more = as_batch([1, 2, 3], model.device)
    return a.offset == b.offset and torch.allclose(model(more, a), model(more, b), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "drafts"),
    [*(("scout", name) for name in DRAFTS), ("maverick", "mixed"), ("top_2", "mixed"), ("nope_first", "mixed")],
)
def test_the_answer_is_that_without_drafts(toys: Toys, kind: str, drafts: str) -> None:
    model = load_checkpoint(toys(kind, 0.25).folder, dtype=torch.float32)
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, len(PROMPT)):
        prompt = PROMPT[:length]
        plain, reason, cache = answered(model, prompt, max_new_tokens=NEW_TOKENS)
        drafter = prompted(plain, drafts)
        found, why, drafted = answered(model, prompt, drafter, max_new_tokens=NEW_TOKENS)
        assert (found, why) == (plain, reason) and drafter.proposed
        assert same_state(model, drafted, cache)


@pytest.mark.parametrize(
    ("kv_dtype", "host_rows"),
    [*itertools.product(["float32", "int8", "fp8"], [None, 0, 1]), ("float16", 1)],
)
def test_in_every_tier_and_storage_type(
    scout: Transformer, tmp_path: Path, kv_dtype: str, host_rows: int | None
) -> None:
    with ExitStack() as files:

        def answer(drafts: Prompted | None = None) -> tuple[list[int], HybridKVCache]:
            rows = None if host_rows is None else files.enter_context(closing(Scratch(tmp_path)))
            where = {"residency": Residency(host_rows), "rows": rows}
            found, _, cache = answered(scout, PROMPT, drafts, max_new_tokens=NEW_TOKENS, kv_dtype=kv_dtype, where=where)
            return found, cache

        plain, cache = answer()
        assert (cache.held().nope_disk > 0) == (host_rows is not None)
        for name in DRAFTS:
            found, drafted = answer(prompted(plain, name))
            assert found == plain and same_state(scout, drafted, cache.fork())


@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_seed_samples_the_same_with_and_without_drafts(scout: Transformer, drafts: str) -> None:
    for seed in range(2):
        for sampling in (Sampling(1.5, seed=seed), Sampling(2.0, top_k=20, top_p=0.9, seed=seed)):
            plain, _, _ = answered(scout, PROMPT, max_new_tokens=NEW_TOKENS, sampling=sampling)
            drafter = prompted(plain, drafts)
            assert answered(scout, PROMPT, drafter, max_new_tokens=NEW_TOKENS, sampling=sampling)[0] == plain


@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_stop_inside_a_draft_ends_the_answer(scout: Transformer, drafts: str) -> None:
    greedy, _, _ = answered(scout, PROMPT, max_new_tokens=NEW_TOKENS)
    for position in (0, 1, 4, 11):
        stop = frozenset({greedy[position]})
        plain, reason, cache = answered(scout, PROMPT, max_new_tokens=NEW_TOKENS, stop_tokens=stop)
        drafter = prompted(greedy, drafts)
        found, why, drafted = answered(scout, PROMPT, drafter, max_new_tokens=NEW_TOKENS, stop_tokens=stop)
        assert (found, why) == (plain, reason) == (greedy[: greedy.index(greedy[position])], "stop")
        assert same_state(scout, drafted, cache)


@pytest.mark.parametrize("drafts", DRAFTS)
def test_an_answer_is_never_longer_than_allowed(scout: Transformer, drafts: str) -> None:
    greedy, _, _ = answered(scout, PROMPT, max_new_tokens=NEW_TOKENS)
    for count in (1, 2, 3, 7, 8, 13):
        drafter = prompted(greedy, drafts)
        found, why, cache = answered(scout, PROMPT, drafter, max_new_tokens=count, spare=0)  # positions for no more
        assert (found, why, cache.offset) == (greedy[:count], "length", len(PROMPT) - 1 + count)
        assert all(room < count for room in drafter.rooms)


@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_loop_is_detected_at_the_same_token(monkeypatch: pytest.MonkeyPatch, drafts: str) -> None:
    monkeypatch.setattr(loop_guard, "LOOP_TOKENS", 20)
    turning = torch.eye(5).roll(1, 1)  # token n is followed by n + 1
    for period in (1, 3, 5):
        logits = turning.clone()
        logits[period - 1] = torch.eye(5)[0]
        plain = Chain(logits).answer(0, max_new_tokens=200, guard=LoopGuard())
        assert plain[1] == "repetition" and len(plain[0]) < 60
        drafter = Prompted(plain[0], *DRAFTS[drafts], 5)
        assert Chain(logits).answer(0, drafter, max_new_tokens=200, guard=LoopGuard()) == plain


def test_right_drafts_save_forwards_and_wrong_ones_cost_none() -> None:
    logits = torch.randn(30, 30, generator=torch.Generator().manual_seed(1))
    plain, _ = Chain(logits).answer(0, max_new_tokens=40)
    forwards = {}
    for name in ("right", "wrong"):
        chain, (wrong, _) = Chain(logits), DRAFTS[name]
        assert chain.answer(0, Prompted(plain, wrong, 7, 30), max_new_tokens=40)[0] == plain
        forwards[name] = chain.forwards
    assert forwards == {"right": 40 // 8, "wrong": 40}


def test_a_draft_leaves_room_for_the_token_before_it(scout: Transformer) -> None:
    """What is fed never reaches the end of an attention chunk, unless it is one token: that could not be taken back."""
    plain, _, cache = answered(scout, PROMPT, max_new_tokens=1, spare=60)
    row = Row(cache, plain[0], max_new_tokens=50, stop_tokens=frozenset(), drafts=Prompted([], 1.0, 100, VOCABULARY))
    seen = set()
    while row.stop_reason is None:
        fed = row.feed()
        assert fed == row.feed()  # a forward that fails is repeated
        left = CHUNK - cache.offset % CHUNK
        assert len(fed) == max(1, min(left - 1, 50 - row.tokens))
        seen.add(len(fed))
        row.take(scout(as_batch(fed, scout.device), cache, logits="all")[0])
    assert seen == set(range(1, CHUNK))


def test_the_drafter_finds_what_an_answer_repeats() -> None:
    """A chain that goes through the prompt again: all but the first tokens come from drafts."""
    ids = array("i", range(60))
    logits = torch.eye(60).roll(1, 1)
    text = IndexedText(ids, text_order(ids))
    chain, drafter = Chain(logits), Drafter([text], ids[-1:])
    found, _ = chain.answer(59, drafter, max_new_tokens=100)
    assert found == [(n % 60) for n in range(100)]
    counts = drafter.counts
    assert counts.steps == chain.forwards < 20 and counts.accepted + counts.steps == 100
    assert counts.proposed - counts.accepted < MOST_TOKENS


SAMPLINGS = {
    "hot": Sampling(1.3, seed=11),
    "top-p": Sampling(1.0, top_p=0.8, seed=12),
    "top-k": Sampling(1.0, top_k=4, seed=13),
}


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        ("hot", 20_000),
        ("top-p", 6000),
        ("top-k", 6000),
        pytest.param("top-p", 20_000, marks=pytest.mark.soak),
        pytest.param("top-k", 20_000, marks=pytest.mark.soak),
    ],
)
def test_drafts_leave_the_distribution_as_it_is(name: str, draws: int) -> None:
    """Chi-square for every pair of a token and its successor. Prints the p value."""
    sampling, size = SAMPLINGS[name], 6
    logits = torch.randn(size, size, generator=torch.Generator().manual_seed(2)) * 1.5

    class Biased:
        """Knows nothing of the answer, and prefers some tokens."""

        accepted, drawn = 0, random.Random(5)

        def propose(self, room: int, rows: int) -> list[int]:
            return self.drawn.choices((1, 2, 4), (5, 1, 2), k=min(room, 3))

        def observe(self, tokens: Any) -> None:
            self.accepted += len(tokens) - 1

    drafts = Biased()
    found, _ = Chain(logits).answer(0, drafts, max_new_tokens=draws, sampling=sampling)
    assert drafts.accepted > draws / 10
    counts = torch.zeros(size, size, dtype=torch.float64)
    for before, after in zip([0, *found], found, strict=False):
        counts[before, after] += 1
    expected = torch.tensor([odds(row.tolist(), sampling) for row in logits]) * counts.sum(1, keepdim=True)
    assert not counts[expected == 0].any()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - size
    p = torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(chi_square / 2)).item()
    print(f"{name}, {draws} draws: chi-square {chi_square:.1f} of {freedom} degrees, p = {p:.3f}")
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def odds(logits: list[float], sampling: Sampling) -> list[float]:
    """The definition in plain float64."""
    weights = [math.exp(x / sampling.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])[: sampling.top_k or None]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if mass >= sampling.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]


# Mistakes that these tests must notice


def accepted_by_odds(patch: pytest.MonkeyPatch) -> None:
    """A drafted token is taken with its own probability, and else one is sampled as if there had been no draft."""
    feed, plain, drafted = Row.feed, l4ctx.engine.row.choose, list[int | None]()

    def fed(row: Row) -> list[int]:
        found = feed(row)
        drafted[:] = [*found[1:], None]
        return found

    def chosen(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
        token = drafted.pop(0)
        if token is not None and sampling.temperature:
            share = (logits.double() / sampling.temperature).softmax(-1)[token]
            if torch.rand((), generator=generator) < share:
                return token
        return plain(logits, sampling, generator)

    patch.setattr(Row, "feed", fed)
    patch.setattr(l4ctx.engine.row, "choose", chosen)


def longer_than_the_answer(patch: pytest.MonkeyPatch) -> None:
    """A draft has room for one token more than the answer has."""
    feed = Row.feed

    def fed(row: Row) -> list[int]:
        row.tokens -= 1
        found = feed(row)
        row.tokens += 1
        return found

    patch.setattr(Row, "feed", fed)


def longer_than_the_cache_takes_back(patch: pytest.MonkeyPatch) -> None:
    """A draft reaches the end of an attention chunk."""
    room = HybridKVCache.room.fget
    assert room is not None
    patch.setattr(HybridKVCache, "room", property(lambda cache: room(cache) + 1))


def test_acceptance_by_odds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted_by_odds(monkeypatch)
    with pytest.raises(AssertionError):
        test_drafts_leave_the_distribution_as_it_is("hot", 20_000)


def test_drafts_that_are_longer_than_their_room_are_noticed(
    scout: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mistake, check in (
        (longer_than_the_answer, lambda: test_an_answer_is_never_longer_than_allowed(scout, "right")),
        (longer_than_the_cache_takes_back, lambda: test_a_draft_leaves_room_for_the_token_before_it(scout)),
    ):
        check()
        with monkeypatch.context() as patch:
            mistake(patch)
            with pytest.raises(AssertionError):
                check()
