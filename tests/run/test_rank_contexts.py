"""Saved contexts and many questions with several ranks, which are threads here: what some wrote, others read."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from cache.errors import DiskError
from cache.fork import ForkedKVCache
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.tiers import RowStore
from l4ctx.contexts.folder import BLOCKS
from l4ctx.contexts.manifest import Recipe
from l4ctx.contexts.reader import ContextReader
from l4ctx.contexts.writer import ContextWriter
from l4ctx.engine.prefill import prefill
from l4ctx.engine.questions import Asked, answer_rounds
from l4ctx.engine.row import Row
from l4ctx.run.channel import END, Channel
from l4ctx.run.follower import Follower
from l4ctx.run.ranks import Job, Leader
from model.config import TextConfig
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.context_toys import spans, tokens
from support.rank_threads import ThreadExchange, Together
from support.toy_checkpoints import CHUNK, DIVISIBLE, SCOUT, VOCABULARY, Kind, write_kind

BLOCK = 2 * CHUNK
IDS = tokens(2 * BLOCK + CHUNK + 3)
QUESTIONS = [array("i", [5, 71, 3, 3]), array("i", [44, 90]), array("i", [12, 8, 60, 1, 2, 3, 9])]
ROOM, ANSWER_TOKENS = 40, 12
LIMIT = 1e-4
RANKS = (1, 2, 4)
T = TypeVar("T")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_kind(folder, "toy", Kind(DIVISIBLE | SCOUT), 0.2, seed=11)
    return folder


class ThreadChannel(Channel):
    def __init__(self, exchange: ThreadExchange) -> None:
        self.exchange: Any = exchange


class Alone:
    """One process, with the methods of a leader."""

    def rows(self, layout: StoreLayout, store: RowStore) -> RowStore:
        return store

    def restore(self, held: Any, cache: HybridKVCache) -> None:
        held.restore(cache)

    def tail(self, cache: HybridKVCache) -> Any:
        return cache.tail()

    def stop_saving(self) -> None:
        pass


def job(checkpoint: Path, kv_dtype: str, *, is_saved: bool) -> Job:
    length = len(IDS) + ROOM
    return Job(str(checkpoint), "float32", "sdpa", None, length, kv_dtype, BLOCK, CHUNK, None, None, is_saved)


def led(count: int, job: Job, work: Callable[[Transformer, Any], T]) -> T:
    """What `work` returns on the first of so many ranks, the others following it; 1: in one process."""
    if count == 1:
        return work(load_checkpoint(Path(job.model), dtype=torch.float32), Alone())

    def run(exchange: ThreadExchange) -> Any:
        channel = ThreadChannel(exchange)
        if exchange.rank.number:
            Follower(channel, Job(**channel.hear_json())).run()
            return None
        channel.tell_json(job.as_dict())
        model = job.load(channel.exchange)
        found = work(model, Leader(model, channel, TextConfig.from_folder(Path(job.model))))
        channel.announce(END)
        return found

    return Together(count).run(run)[0]


def recipe(kv_dtype: str) -> Recipe:
    return Recipe(
        *(digit * 64 for digit in "1234"), "float32", kv_dtype, "sdpa", BLOCK, BLOCK, CHUNK, "2026-11-21T10:20:30"
    )


def keep(count: int, checkpoint: Path, folder: Path, kv_dtype: str, *, stop: int | None = None) -> int:
    """Reads IDS into the context, or up to `stop`; returns how many tokens it had."""
    said = job(checkpoint, kv_dtype, is_saved=True)

    def work(model: Transformer, leader: Any) -> int:
        with closing(ContextWriter(folder, recipe(kv_dtype))) as writer:
            writer.drop_damaged(verify=True)
            layout = said.layout(model.config)
            start = writer.begin(memoryview(IDS), spans(IDS), layout, system=False, images=())
            cache = said.cache(model, leader.rows(layout, writer))
            leader.restore(writer.context.held(writer.tip, start), cache)
            for _ in prefill(model, cache, memoryview(IDS)[start:], prefill_chunk_size=BLOCK):
                if stop is not None and cache.offset >= stop:
                    return start
            writer.finish(cache, leader.tail)
            cache.rows = None
            leader.stop_saving()
            return start

    return led(count, said, work)


def logits(count: int, checkpoint: Path, folder: Path, kv_dtype: str) -> Tensor:
    """Of the first question, after what the context holds."""
    said = job(checkpoint, kv_dtype, is_saved=False)

    def work(model: Transformer, leader: Any) -> Tensor:
        cache = said.cache(model, None)
        with closing(ContextReader(folder)) as reader:
            leader.restore(reader.context.held(reader.state, reader.tokens), cache)
            found = model(torch.tensor([list(QUESTIONS[0])]), cache)
        assert found is not None
        return found.clone()

    return led(count, said, work)


@functools.cache
def fresh(checkpoint: Path) -> Tensor:
    said = job(checkpoint, "float32", is_saved=False)
    model = load_checkpoint(checkpoint, dtype=torch.float32)
    cache = said.cache(model, None)
    for _ in prefill(model, cache, memoryview(IDS), prefill_chunk_size=BLOCK):
        pass
    found = model(torch.tensor([list(QUESTIONS[0])]), cache)
    assert found is not None
    return found


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("writers", RANKS)
def test_a_context_is_read_by_any_number_of_ranks(
    checkpoint: Path, tmp_path: Path, writers: int, kv_dtype: str
) -> None:
    assert keep(writers, checkpoint, tmp_path, kv_dtype) == 0
    found = [logits(readers, checkpoint, tmp_path, kv_dtype) for readers in RANKS]
    for other in found:
        assert (other - found[0]).abs().max() <= LIMIT
    if kv_dtype == "float32":
        assert (found[0] - fresh(checkpoint)).abs().max() <= LIMIT


def test_another_number_of_ranks_resumes(checkpoint: Path, tmp_path: Path) -> None:
    assert keep(2, checkpoint, tmp_path, "float32", stop=BLOCK) == 0
    assert keep(4, checkpoint, tmp_path, "float32", stop=2 * BLOCK) == BLOCK
    assert keep(1, checkpoint, tmp_path, "float32") == 2 * BLOCK
    assert (logits(2, checkpoint, tmp_path, "float32") - fresh(checkpoint)).abs().max() <= LIMIT


def test_each_rank_finds_damage(checkpoint: Path, tmp_path: Path) -> None:
    keep(1, checkpoint, tmp_path, "float32")
    block = min((tmp_path / BLOCKS).iterdir())
    content = bytearray(block.read_bytes())
    content[-5] ^= 1  # in the last rank's heads
    block.write_bytes(content)
    with pytest.raises(DiskError, match="checksum"):
        logits(2, checkpoint, tmp_path, "float32")


class OneImage:
    """Features in place of the embeddings of some tokens: see l4ctx.vision.features.ImageFeatures."""

    def among(self, positions: range) -> bool:
        return CHUNK in positions

    @torch.inference_mode()
    def splice(self, embeddings: Tensor, ids: Tensor, positions: range) -> None:
        assert embeddings.shape[:2] == ids.shape and positions.start == 0
        embeddings[:, 3:CHUNK] = torch.linspace(-1, 1, embeddings.shape[-1])


def test_images_enter_on_the_first_rank(checkpoint: Path) -> None:
    def read(features: Any, count: int) -> Tensor:
        said = job(checkpoint, "float32", is_saved=False)

        def work(model: Transformer, leader: Any) -> Tensor:
            cache = said.cache(model, None)
            for _ in prefill(model, cache, memoryview(IDS), prefill_chunk_size=BLOCK, features=features):
                pass
            found = model(torch.tensor([list(QUESTIONS[0])]), cache)
            assert found is not None
            return found.clone()

        return led(count, said, work)

    expected = read(OneImage(), 1)
    assert (expected - read(None, 1)).abs().max() > 100 * LIMIT
    for count in RANKS[1:]:
        assert (read(OneImage(), count) - expected).abs().max() <= LIMIT


class HalfRight:
    """Drafts of one token of the answer and a wrong one."""

    def __init__(self, answer: Sequence[int]) -> None:
        self._answer, self._done = answer, 0

    def propose(self, room: int, rows: int = 1) -> list[int]:
        right = self._answer[self._done : self._done + 1]
        return [*right, *((token + 1) % VOCABULARY for token in right)][:room]

    def observe(self, tokens: Sequence[int]) -> None:
        self._done += len(tokens)


def test_many_questions(checkpoint: Path) -> None:
    """Two at a time, so that forks come and go; with drafts, some of which are wrong and taken back."""
    expected = asked(1, checkpoint)
    assert all(len(ids) == ANSWER_TOKENS for ids in expected)
    for count in RANKS:
        assert asked(count, checkpoint, expected) == expected
    assert asked(2, checkpoint) == expected


def asked(count: int, checkpoint: Path, known: list[list[int]] | None = None) -> list[list[int]]:
    said = job(checkpoint, "float32", is_saved=False)

    def begin(number: int, cache: ForkedKVCache, token: int) -> Row:
        return Row(
            cache,
            token,
            max_new_tokens=ANSWER_TOKENS,
            stop_tokens=frozenset(),
            drafts=HalfRight(known[number]) if known else None,
        )

    def work(model: Transformer, leader: Any) -> list[list[int]]:
        cache = said.cache(model, None)
        for _ in prefill(model, cache, memoryview(IDS), prefill_chunk_size=BLOCK):
            pass
        questions = (Asked(number, ids, len(ids) + ANSWER_TOKENS) for number, ids in enumerate(QUESTIONS))
        answers: dict[int, list[int]] = {}
        for done in answer_rounds(model, cache, questions, begin, rows=2, step_tokens=5):
            answers |= {one.question: list(one.ids) for one in done.answered}
        return [answers[number] for number in range(len(QUESTIONS))]

    return led(count, said, work)
