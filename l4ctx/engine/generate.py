"""The decode loop of one answer: a generator of token ids. Detokenization is left to the caller."""

from __future__ import annotations

from collections.abc import Generator

from l4ctx.engine.prefill import as_batch
from l4ctx.engine.row import Row, StopReason
from model.transformer import Transformer


def generate(model: Transformer, row: Row) -> Generator[int, None, StopReason]:
    """Yields the token ids of `row` as they become certain, and returns why the answer ended.

    Raises GenerationError if the logits are not finite.
    """
    while row.stop_reason is None:
        logits = model(as_batch(row.feed(), model.device), row.cache, logits="all", observer=row.observer)
        yield from row.take(logits[0])
    return row.stop_reason
