"""A tiny random model and its saved contexts: created, continued and asked in this process, as l4ctx.run.session does.

By default a block is two attention chunks in two segments, so that ten blocks are ten small files. Knows nothing of
text: documents are token ids. Does not import pytest, because tests/soak/kill_prefill.py uses it.
"""

from __future__ import annotations

import functools
import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import Residency
from l4ctx.contexts.folder import BLOCKS, JOURNAL
from l4ctx.contexts.journal import Journal
from l4ctx.contexts.manifest import Recipe
from l4ctx.contexts.reader import Context, ContextReader
from l4ctx.contexts.reuse import reusable
from l4ctx.contexts.writer import ContextWriter
from l4ctx.engine.prefill import as_batch, prefill
from l4ctx.spans import ImageSpan, Span
from model.config import TextConfig
from model.transformer import Transformer
from support.error_budget import difference, in_float64, limit

Module = TypeVar("Module", bound=nn.Module)

CHUNK, BLOCK, VOCABULARY = 16, 32, 97
CONFIG = TextConfig.from_dict(
    {
        "model_type": "llama4_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 20,
        "intermediate_size_mlp": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 3,
        "attention_chunk_size": CHUNK,
        "floor_scale": 9,
        "max_position_embeddings": 4096,
        "no_rope_layers": [0, 1, 0],
        "moe_layers": [1],
    }
)
IN_MEMORY = Residency()
QUESTION = array("i", [5, 71, 3, 3, 44, 90, 12, 8, 60])


@dataclass(frozen=True)
class Kind:
    """The settings of a saved context."""

    kv_dtype: str = "float32"
    dtype: str = "float32"
    prefill_chunk_size: int = CHUNK
    block_tokens: int = BLOCK
    segment_tokens: int = CHUNK

    def layout(self, tokens: int) -> StoreLayout:
        """The layout of a run over `tokens` tokens and the question."""
        return StoreLayout(
            CONFIG, tokens + len(QUESTION), self.dtype, self.kv_dtype, 1, self.block_tokens, self.segment_tokens
        )

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            "0c" * 32,
            "1a" * 32,
            "2b" * 32,
            "3d" * 32,
            self.dtype,
            self.kv_dtype,
            "sdpa",
            self.prefill_chunk_size,
            self.block_tokens,
            self.segment_tokens,
            "2026-11-21T10:20:30",
        )


@functools.cache
def model(dtype: str = "float32") -> Transformer:
    """A model with random weights, the same on each call."""
    return randomized(Transformer(CONFIG).to(getattr(torch, dtype)), seed=0)


def randomized(module: Module, seed: int) -> Module:
    """Gives the module random weights, and returns it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def tokens(count: int, seed: int = 0) -> array[int]:
    chance = random.Random(seed)
    return array("i", [chance.randrange(VOCABULARY) for _ in range(count)])


def changed(ids: array[int], *positions: int) -> array[int]:
    """`ids` with a different token at each of these positions."""
    ids = ids[:]
    for position in positions:
        ids[position] = (ids[position] + 1) % VOCABULARY
    return ids


def spans(ids: Sequence[int]) -> list[Span]:
    return [Span("notes/a.txt", 3, 20, "00" * 32), Span("b ü.txt", 20, len(ids) - 2, "ff" * 32)]


def reading(
    writer: ContextWriter,
    ids: array[int],
    kind: Kind = Kind(),
    residency: Residency = IN_MEMORY,
    images: Sequence[ImageSpan] = (),
    features: Any = None,
) -> Iterator[int]:
    """Reads `ids` into the context. Yields how many tokens it had, then how many it has after each step.

    `features` are those of the images in `ids`.
    """
    layout = kind.layout(len(ids))
    start = writer.begin(memoryview(ids), spans(ids), layout, system=False, images=images)
    yield start
    if writer.tip.is_complete:
        return
    cache = HybridKVCache(
        CONFIG, length=layout.length, dtype=getattr(torch, kind.dtype), layout=layout, residency=residency, rows=writer
    )
    writer.restore(cache, start)
    for _ in prefill(
        model(kind.dtype), cache, memoryview(ids)[start:], prefill_chunk_size=kind.prefill_chunk_size, features=features
    ):
        yield cache.offset
    writer.finish(cache.offset, cache.tail)


def keep(
    folder: Path,
    ids: array[int],
    kind: Kind = Kind(),
    *,
    stop: int | None = None,
    verify: bool = False,
    residency: Residency = IN_MEMORY,
    images: Sequence[ImageSpan] = (),
    features: Any = None,
) -> int:
    """Does what `l4ctx prefill` does, optionally up to a number of tokens; returns how many were there before."""
    with closing(ContextWriter(folder, kind.recipe)) as writer:
        writer.drop_damaged(verify=verify)
        start = None
        for done in reading(writer, ids, kind, residency, images, features):
            start = done if start is None else start
            if stop is not None and done >= stop:
                break
        assert start is not None
        return start


def answer(
    folder: Path,
    kind: Kind = Kind(),
    *,
    ids: array[int] | None = None,
    residency: Residency = IN_MEMORY,
    dtype: str | None = None,
) -> Tensor:
    """Logits of the question after the context's tokens, or after `ids`, of which it may hold a prefix."""
    with closing(ContextReader(folder)) as reader:
        return answer_of(reader, kind, ids=ids, residency=residency, dtype=dtype)


def answer_of(
    reader: ContextReader,
    kind: Kind = Kind(),
    *,
    ids: array[int] | None = None,
    residency: Residency = IN_MEMORY,
    dtype: str | None = None,
) -> Tensor:
    dtype = dtype or kind.dtype
    count = reader.tokens if ids is None else len(ids)
    layout = kind.layout(count).computed_in(dtype)
    cache = HybridKVCache(CONFIG, length=layout.length, dtype=getattr(torch, dtype), layout=layout, residency=residency)
    start = count if ids is None else reusable(reader.context, memoryview(ids), layout, [reader.state], ()).tokens
    if start:
        reader.context.restore(reader.state, cache, start)
    if ids is not None:
        read(cache, memoryview(ids)[start:], replace(kind, dtype=dtype))
    return logits(cache, dtype)


def fresh_answer(ids: array[int], kind: Kind = Kind()) -> Tensor:
    """The answer of a run without a context."""
    return _fresh_answer(bytes(ids), kind)


@functools.lru_cache(maxsize=256)
def _fresh_answer(ids: bytes, kind: Kind) -> Tensor:
    layout = kind.layout(len(ids) // 4)
    cache = HybridKVCache(CONFIG, length=layout.length, dtype=getattr(torch, kind.dtype), layout=layout)
    read(cache, memoryview(array("i", ids)), kind)
    return logits(cache, kind.dtype)


@functools.cache
def rounding() -> float:
    """The limit for the relative difference of the model's float32 logits from float64 ones."""
    ids = as_batch(tokens(8 * BLOCK), torch.device("cpu"))
    return limit(in_float64(model(), lambda model: model(ids)), model()(ids))


def close(a: Tensor, b: Tensor) -> bool:
    """Equal within rounding on both sides, as for a run that resumes off the grid of a fresh run."""
    return difference(a, b) <= 2 * rounding()


def read(cache: HybridKVCache, ids: memoryview, kind: Kind) -> None:
    for _ in prefill(model(kind.dtype), cache, ids, prefill_chunk_size=kind.prefill_chunk_size):
        pass


def logits(cache: HybridKVCache, dtype: str) -> Tensor:
    """Logits of the question after the cache's tokens."""
    found = model(dtype)(as_batch(QUESTION, torch.device("cpu")), cache)
    assert found is not None and found.isfinite().all()
    return found


def block_digests(folder: Path) -> list[str]:
    """Digests of the bytes of every block of the newest complete state."""
    state = Context.read(folder).complete
    assert state is not None
    return [hashlib.sha256((folder / block.name).read_bytes()).hexdigest() for block in state.blocks]


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of every file in a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): (b"" if path.is_dir() else path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def block_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / BLOCKS).iterdir())


def journal_types(folder: Path) -> list[str]:
    return [record["type"] for record in Journal.read(folder / JOURNAL)]
