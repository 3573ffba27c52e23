"""Drafts that a test prescribes, and answers with and without them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.engine.generate import generate
from l4ctx.engine.loop_guard import LoopGuard
from l4ctx.engine.prefill import prefill
from l4ctx.engine.row import Drafts, Row
from model.transformer import Transformer
from support.cached_paths import small_layout


@dataclass
class Prompted:
    """Proposes what `answer` says, each token wrong with the chance `wrong`; as much as there is room for, up to
    `most`."""

    answer: Sequence[int]
    wrong: float
    most: int
    vocabulary: int
    drawn: random.Random = field(default_factory=lambda: random.Random(3))
    done: int = 0
    rooms: list[int] = field(default_factory=list)
    proposed: int = 0

    def propose(self, room: int, rows: int) -> list[int]:
        assert room >= 0 and rows > 0
        self.rooms.append(room)
        there = [*self.answer[self.done :], *range(self.most)][: min(room, self.most)]
        self.proposed += len(there)
        return [(token + (self.drawn.random() < self.wrong)) % self.vocabulary for token in there]

    def observe(self, tokens: Sequence[int]) -> None:
        self.done += len(tokens)


@dataclass
class Chain:
    """A model whose next token depends on the last alone: logits (V, V), a row for each last token. Its cache counts
    tokens, and can take back as many as `room`."""

    logits: Tensor
    room: int = 50
    offset: int = 0
    forwards: int = 0

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def __call__(self, ids: Tensor, cache: Chain, logits: str, observer: None = None) -> Tensor:
        assert ids.shape[1] == 1 or ids.shape[1] <= self.room
        cache.offset += ids.shape[1]
        self.forwards += 1
        return self.logits[ids]

    def rewind(self, offset: int) -> None:
        assert self.offset - self.room < offset < self.offset
        self.offset = offset

    def answer(self, token: int, drafts: Drafts | None = None, **how: Any) -> tuple[list[int], str]:
        """Tokens and why they end."""
        how = {"stop_tokens": frozenset(), **how}
        return ended(generate(self, Row(self, token, drafts=drafts, **how)))  # type: ignore[arg-type]


def ended(tokens: Any) -> tuple[list[int], str]:
    """All that a generator yields, and what it returns."""
    found = []
    while True:
        try:
            found.append(next(tokens))
        except StopIteration as end:
            return found, end.value


def answered(
    model: Transformer,
    prompt: Sequence[int],
    drafts: Drafts | None = None,
    *,
    max_new_tokens: int,
    stop_tokens: frozenset[int] = frozenset(),
    sampling: Sampling = Sampling(),
    guard: LoopGuard | None = None,
    kv_dtype: str = "auto",
    spare: int = 8,
    where: Mapping[str, Any] = {},
) -> tuple[list[int], str, HybridKVCache]:
    """Prefill and an answer, with a cache of blocks of two attention chunks; `where` says where they lie."""
    length = len(prompt) + max_new_tokens + spare
    dtype = str(model.dtype).removeprefix("torch.")
    layout = small_layout(model.config, length=length, dtype=dtype, kv_dtype=kv_dtype, block_chunks=2, segment_chunks=1)
    cache = HybridKVCache(model.config, length=length, dtype=model.dtype, layout=layout, **where)
    for _ in prefill(model, cache, prompt[:-1], prefill_chunk_size=layout.config.attention_chunk_size):
        pass
    row = Row(
        cache,
        prompt[-1],
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampling=sampling,
        guard=guard,
        drafts=drafts,
    )
    return *ended(generate(model, row)), cache
