"""How the documents to be read differ from those of a saved context, in words: the first difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l4ctx.spans import Span


def first_difference(saved: Sequence[Span], given: Sequence[Span], same_tokens: int) -> str:
    """Why only the first `same_tokens` tokens of a context's documents are those of the given ones."""
    starts = {spans[0].start for spans in (saved, given) if spans}
    if len(starts) != 1 or same_tokens < min(starts):
        return "what comes before the first document differs (--system)"
    number = next((n for n, span in enumerate(given) if span.stop > same_tokens), len(given))
    old, new = (spans[number] if number < len(spans) else None for spans in (saved, given))
    if new is None:
        return "they end there" if old is None else f"{old.source} is not among them"
    if old is None:
        return f"{new.source} is new"
    if old.sha256 == new.sha256:
        return (
            f"{new.source} is read differently now (--encoding, --pdf, --no-images or --line-numbers)"
            if old.source == new.source
            else f"{new.source} was {old.source} before"
        )
    return f"{new.source} has changed" if old.source == new.source else f"{new.source} is where {old.source} was"
