"""The decode loop of one answer: a generator of token ids. Detokenization is left to the caller."""

from __future__ import annotations

from collections.abc import Generator

from cache.context import ContextKVCache
from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.engine.loop_guard import LoopGuard
from l4ctx.engine.prefill import as_batch
from l4ctx.engine.row import Drafts, Row, StopReason
from model.transformer import Transformer


def generate(
    model: Transformer,
    cache: HybridKVCache | ContextKVCache,
    token: int,
    *,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    sampling: Sampling = Sampling(),
    guard: LoopGuard | None = None,
    drafts: Drafts | None = None,
) -> Generator[int, None, StopReason]:
    """Continues from `token`, the prompt's last token, which is not in the KV cache yet.

    Yields token ids as they become certain, and returns why the answer ended, as `Row` says. Raises GenerationError if
    the logits are not finite.
    """
    row = Row(
        cache,
        token,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampling=sampling,
        guard=guard,
        drafts=drafts,
    )
    while row.stop_reason is None:
        logits = model(as_batch(row.feed(), model.device), cache, logits="all")
        yield from row.take(logits[0])
    return row.stop_reason
