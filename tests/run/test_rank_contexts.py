"""Saved contexts and many questions with several ranks, which are threads here: what some wrote, others read."""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cache.context import Continuation
from cache.errors import DiskError
from cache.hybrid import HybridKVCache
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
from support.rank_threads import ThreadContextExchange, ThreadExchange, Together
from support.toy_checkpoints import CHUNK, DIVISIBLE, SCOUT, VOCABULARY, Kind, write_kind

BLOCK = 2 * CHUNK
IDS = tokens(4 * BLOCK + CHUNK + 3)
QUESTIONS = [array("i", [5, 71, 3, 3]), array("i", [44, 90]), array("i", [12, 8, 60, 1, 2, 3, 9])]
ROOM, ANSWER_TOKENS = 40, 12
LIMIT = 1e-4
Mesh = tuple[int, int]
ALONE: Mesh = (1, 1)
MESHES: tuple[Mesh, ...] = (ALONE, (2, 1), (4, 1), (1, 2), (1, 3), (2, 2))
"""Tensor x context ranks."""
T = TypeVar("T")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_kind(folder, "toy", Kind(DIVISIBLE | SCOUT | {"no_rope_layers": [1, 0, 1, 0]}), 0.2, seed=11)
    return folder


class ThreadChannel(Channel):
    def __init__(self, world: ThreadExchange, row: ThreadExchange, column: ThreadContextExchange) -> None:
        self.exchange: Any = world
        self._mesh: Any = (row if row.rank.count > 1 else None, column if column.rank.count > 1 else None)

    def mesh(self, context_ranks: int) -> Any:
        return self._mesh


class Alone:
    """One process, with the methods of a leader."""

    def restore(self, held: Any, cache: HybridKVCache) -> None:
        held.restore(cache)

    def tail(self, cache: HybridKVCache) -> Any:
        return cache.tail()

    def stop_saving(self, cache: HybridKVCache, rows: RowStore | None) -> None:
        cache.rows = rows


def job(checkpoint: Path, kv_dtype: str = "float32", sizes: tuple[int, int] = (BLOCK, CHUNK), **options: Any) -> Job:
    """`sizes` of a block and of a segment."""
    said = Job(str(checkpoint), "float32", "sdpa", None, len(IDS) + ROOM, kv_dtype, *sizes, None, None, is_saved=False)
    return dataclasses.replace(said, **options)


def led(mesh: Mesh, job: Job, work: Callable[[Transformer, Any, Job], T]) -> T:
    """What `work` returns on the first of these ranks, the others following it; 1 x 1: in one process."""
    if mesh == ALONE:
        return work(load_checkpoint(Path(job.model), dtype=torch.float32), Alone(), job)
    job = dataclasses.replace(job, context_ranks=mesh[1])

    def run(*exchanges: Any) -> Any:
        channel = ThreadChannel(*exchanges)
        if channel.exchange.rank.number:
            Follower(channel, Job(**channel.hear_json())).run()
            return None
        channel.tell_json(job.as_dict())
        model = job.load(*channel.mesh(mesh[1]))
        found = work(model, Leader(model, channel, TextConfig.from_folder(Path(job.model))), job)
        channel.announce(END)
        return found

    return Together(mesh[0] * mesh[1]).run_mesh(mesh[1], run)[0]


def recipe(kv_dtype: str, step: int, sizes: tuple[int, int]) -> Recipe:
    return Recipe(*(digit * 64 for digit in "1234"), "float32", kv_dtype, "sdpa", step, *sizes, "2026-11-21T10:20:30")


def keep(
    mesh: Mesh,
    checkpoint: Path,
    folder: Path,
    kv_dtype: str,
    *,
    stop: int | None = None,
    step: int = BLOCK,
    sizes: tuple[int, int] = (BLOCK, CHUNK),
    host_rows: int | None = None,
) -> int:
    """Reads IDS into the context, or up to `stop`; returns how many tokens it had."""

    def work(model: Transformer, leader: Any, said: Job) -> int:
        with closing(ContextWriter(folder, recipe(kv_dtype, step, sizes))) as writer:
            writer.drop_damaged(verify=True)
            layout = said.layout(model.config)
            start = writer.begin(memoryview(IDS), spans(IDS), layout, system=False, images=())
            is_alone = mesh == ALONE
            cache = said.cache(model, *([writer] if is_alone else [None, leader.saved_rows(said, writer)]))
            leader.restore(writer.context.held(writer.tip, start), cache)
            for _ in prefill(model, cache, memoryview(IDS)[start:], prefill_chunk_size=step):
                if stop is not None and cache.offset >= stop:
                    return start
            writer.finish(cache.offset, lambda: leader.tail(cache))
            leader.stop_saving(cache, None)
            return start

    return led(mesh, job(checkpoint, kv_dtype, sizes, is_saved=True, host_rows=host_rows), work)


def logits(mesh: Mesh, checkpoint: Path, folder: Path, kv_dtype: str = "float32", **options: Any) -> Tensor:
    """Of the first question, after what the context holds."""

    def work(model: Transformer, leader: Any, said: Job) -> Tensor:
        cache = said.cache(model, None)
        with closing(ContextReader(folder)) as reader:
            leader.restore(reader.context.held(reader.state, reader.tokens), cache)
            found = model(torch.tensor([list(QUESTIONS[0])]), cache)
        assert found is not None
        return found.clone()

    return led(mesh, job(checkpoint, kv_dtype, **options), work)


@functools.cache
def fresh(checkpoint: Path) -> Tensor:
    model = load_checkpoint(checkpoint, dtype=torch.float32)
    cache = job(checkpoint).cache(model, None)
    for _ in prefill(model, cache, memoryview(IDS), prefill_chunk_size=BLOCK):
        pass
    found = model(torch.tensor([list(QUESTIONS[0])]), cache)
    assert found is not None
    return found


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("writers", [ALONE, (4, 1), (1, 3), (2, 2)], ids=str)
def test_a_context_is_read_by_any_number_of_ranks(
    checkpoint: Path, tmp_path: Path, writers: Mesh, kv_dtype: str
) -> None:
    assert keep(writers, checkpoint, tmp_path, kv_dtype) == 0
    found = [logits(readers, checkpoint, tmp_path, kv_dtype) for readers in MESHES]
    for other in found:
        assert (other - found[0]).abs().max() <= LIMIT
    if kv_dtype == "float32":
        assert (found[0] - fresh(checkpoint)).abs().max() <= LIMIT


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the context's blocks and tail, by file and name."""
    found = {}
    for number, file in enumerate([*sorted((folder / BLOCKS).iterdir()), *folder.glob("tail-*")]):
        with safe_open(file, "pt") as content:
            found |= {f"{number} {name}": content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(("block", "segment"), [(2 * CHUNK, CHUNK), (3 * CHUNK, 3 * CHUNK)])
def test_the_folder_is_that_of_one_process(checkpoint: Path, tmp_path: Path, block: int, segment: int) -> None:
    """Also where own blocks end within those that are saved, and where a prefill chunk is less than a block; and where
    segments are of several attention chunks, and so of several ranks."""
    for name, mesh, step in (("alone", ALONE, block), ("ranks", (2, 2), CHUNK)):
        keep(mesh, checkpoint, tmp_path / name, "float32", step=step, sizes=(block, segment), host_rows=0)
    alone, others = stored(tmp_path / "alone"), stored(tmp_path / "ranks")
    assert alone.keys() == others.keys() and len(alone) >= 20
    assert all((alone[name] - others[name]).abs().max() <= LIMIT for name in alone)
    for name in ("alone", "ranks"):
        found = logits((1, 2), checkpoint, tmp_path / name, sizes=(block, segment))
        assert (found - fresh(checkpoint)).abs().max() <= LIMIT


def test_another_number_of_ranks_resumes(checkpoint: Path, tmp_path: Path) -> None:
    assert keep((1, 2), checkpoint, tmp_path, "float32", stop=BLOCK) == 0
    assert keep((4, 1), checkpoint, tmp_path, "float32", stop=2 * BLOCK) == BLOCK
    assert keep((2, 2), checkpoint, tmp_path, "float32", stop=3 * BLOCK) == 2 * BLOCK
    assert keep(ALONE, checkpoint, tmp_path, "float32") == 3 * BLOCK
    assert (logits((2, 1), checkpoint, tmp_path) - fresh(checkpoint)).abs().max() <= LIMIT


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
def test_each_rank_finds_damage(checkpoint: Path, tmp_path: Path, mesh: Mesh) -> None:
    keep(ALONE, checkpoint, tmp_path, "float32")
    block = min((tmp_path / BLOCKS).iterdir())
    content = bytearray(block.read_bytes())
    content[-5] ^= 1  # in the last rank's heads and tokens
    block.write_bytes(content)
    with pytest.raises(DiskError, match="checksum"):
        logits(mesh, checkpoint, tmp_path)


class OneImage:
    """Features in place of the embeddings of some tokens: see l4ctx.vision.features.ImageFeatures."""

    def among(self, positions: range) -> bool:
        return CHUNK in positions

    @torch.inference_mode()
    def splice(self, embeddings: Tensor, ids: Tensor, positions: range) -> None:
        assert embeddings.shape[:2] == ids.shape and positions.start == 0
        embeddings[:, 3:CHUNK] = torch.linspace(-1, 1, embeddings.shape[-1])


def test_images_enter_on_the_first_rank(checkpoint: Path) -> None:
    def read(features: Any, mesh: Mesh) -> Tensor:
        def work(model: Transformer, leader: Any, said: Job) -> Tensor:
            cache = said.cache(model, None)
            for _ in prefill(model, cache, memoryview(IDS), prefill_chunk_size=BLOCK, features=features):
                pass
            found = model(torch.tensor([list(QUESTIONS[0])]), cache)
            assert found is not None
            return found.clone()

        return led(mesh, job(checkpoint), work)

    expected = read(OneImage(), ALONE)
    assert (expected - read(None, ALONE)).abs().max() > 100 * LIMIT
    for mesh in MESHES[1:]:
        assert (read(OneImage(), mesh) - expected).abs().max() <= LIMIT


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
    expected = asked(ALONE, checkpoint)
    assert all(len(ids) == ANSWER_TOKENS for ids in expected)
    for mesh in ((4, 1), (1, 3), (2, 2)):
        assert asked(mesh, checkpoint, expected) == expected
    for mesh in ((2, 1), (1, 2)):
        assert asked(mesh, checkpoint) == expected


def asked(mesh: Mesh, checkpoint: Path, known: list[list[int]] | None = None) -> list[list[int]]:
    def begin(number: int, cache: Continuation, token: int) -> Row:
        return Row(
            cache,
            token,
            max_new_tokens=ANSWER_TOKENS,
            stop_tokens=frozenset(),
            drafts=HalfRight(known[number]) if known else None,
        )

    def work(model: Transformer, leader: Any, said: Job) -> list[list[int]]:
        cache = said.cache(model, None)
        for _ in prefill(model, cache, memoryview(IDS), prefill_chunk_size=BLOCK):
            pass
        questions = (Asked(number, ids, len(ids) + ANSWER_TOKENS) for number, ids in enumerate(QUESTIONS))
        answers: dict[int, list[int]] = {}
        for done in answer_rounds(model, cache, questions, begin, rows=2, step_tokens=5):
            answers |= {one.question: list(one.ids) for one in done.answered}
        return [answers[number] for number in range(len(QUESTIONS))]

    return led(mesh, job(checkpoint), work)
