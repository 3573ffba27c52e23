"""Refuses to read documents into a context where that would discard what it holds of others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from cache.errors import DiskError
from l4ctx.contexts.reader import Context
from l4ctx.contexts.reuse import common_prefix
from l4ctx.contexts.states import State
from l4ctx.errors import ContextError
from l4ctx.spans import Span

SHOWN_DOCUMENTS = 3


@dataclass(frozen=True)
class Reading:
    """What is to be read into a context: the documents' token ids and spans, and the options that matter here.

    `folders` are the folders that were walked: a document of theirs that is no longer there was deleted.
    """

    ids: memoryview
    spans: Sequence[Span]
    folders: Sequence[str]
    has_system_prompt: bool
    attention_chunk_size: int


def check_loss(context: Context, reading: Reading) -> None:
    """Raises ContextError where the context holds documents that are not among those to be read, or where an option
    would make the same ones be read again. Documents that grew or changed are no loss, and a set of documents whose
    reading was interrupted is resumed. Raises DiskError where a context's list of documents is damaged.
    """
    losses = []
    for state in context.usable:  # the newest one, and the newest that is complete
        kept = state.kept(context.recipe.block_tokens)
        loss: str | None = None
        with suppress(*([] if kept else [DiskError])):  # where nothing is kept, nothing can be lost
            loss = _loss(context, state, reading)
            if loss is None:
                return
        if kept and loss is not None:
            losses.append(loss)
    if losses:
        raise ContextError(
            f"{context.folder}: {losses[-1]}; nothing was changed: name another folder, or add --replace"
        )


def _loss(context: Context, state: State, reading: Reading) -> str | None:
    """What would be discarded, as a message; None if nothing would."""
    saved = context.documents(state)
    common = common_prefix(context.ids(state), reading.ids)
    lost = _lost(saved, reading, common)
    if lost:
        names = ", ".join(f"{span.source} ({span.stop - span.start:,} tokens)" for span in lost[:SHOWN_DOCUMENTS])
        more = f" and {len(lost) - SHOWN_DOCUMENTS:,} more" if len(lost) > SHOWN_DOCUMENTS else ""
        return (
            f"it holds other documents, which would be lost: {names}{more}, "
            f"in all {sum(span.stop - span.start for span in lost):,} tokens"
        )
    first, now = (spans[0] if spans else None for spans in (saved, reading.spans))
    if (
        first is None
        or now is None
        or (first.source, first.sha256) != (now.source, now.sha256)
        or common >= min(first.stop, reading.attention_chunk_size)
    ):
        return None
    kept = state.kept(context.recipe.block_tokens)
    if common < first.start or first.start != now.start:
        what = (
            "with another system prompt (--system)"
            if state.system or reading.has_system_prompt
            else "with different text before them"
        )
    else:
        what = "differently (--pdf, --no-images or another option of how files are read)"
    return f"it holds these documents, read {what}: all {kept:,} tokens would be read again"


def _lost(saved: Sequence[Span], reading: Reading, common: int) -> list[Span]:
    """The saved documents that are gone, by name and content; all of them where few of them are left."""
    names, contents = {span.source for span in reading.spans}, {span.sha256 for span in reading.spans}

    def is_named(span: Span) -> bool:
        if _is_stdin(span.source):  # every pipe has this name: it is the same text if most of it is equal
            return common > (span.start + span.stop) // 2
        return span.source in names

    def is_in_a_folder(span: Span) -> bool:
        return not _is_stdin(span.source) and any(
            not folder or span.source.startswith(f"{folder}/") for folder in reading.folders
        )

    same = [span for span in saved if span.sha256 in contents]
    named = [span for span in saved if is_named(span)]
    if not same and 2 * len(named) < len(saved):
        return list(saved)
    return [span for span in saved if span.sha256 not in contents and not is_named(span) and not is_in_a_folder(span)]


def _is_stdin(source: str) -> bool:
    return source == "stdin" or source.startswith("stdin (")
