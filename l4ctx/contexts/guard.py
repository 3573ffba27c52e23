"""Whether reading documents into a context would throw away what was read of others: then it is not done unasked.

Reads what the context lists, and changes nothing. What can be reused of it: `l4ctx.contexts.reuse`.
"""

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
    """What is to be read into a context: the documents' ids and spans, and how they were asked for.

    `folders` are the sources of folders that were walked: a document that is not in its folder any more was deleted.
    """

    ids: memoryview
    spans: Sequence[Span]
    folders: Sequence[str]
    has_system_prompt: bool
    attention_chunk_size: int


def check_loss(context: Context, reading: Reading) -> None:
    """Raises ContextError where documents that the context holds are not among those to be read, and where the same
    ones would be read anew because of an option. What grew or changed among them is no loss.

    A set of documents that is being read already, or was, goes on. Raises DiskError for a list that is damaged.
    """
    losses = []
    for state in context.usable:  # the newest one, and the newest that is complete
        kept = state.kept(context.recipe.block_tokens)
        loss: str | None = None
        with suppress(*([] if kept else [DiskError])):  # where nothing is kept, nothing is lost
            loss = _loss(context, state, reading)
            if loss is None:
                return
        if kept and loss is not None:
            losses.append(loss)
    if losses:
        raise ContextError(
            f"{context.folder}: {losses[-1]}; it is left as it is: name another folder, or add --replace"
        )


def _loss(context: Context, state: State, reading: Reading) -> str | None:
    """What of a set of documents would be thrown away."""
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
            else "with another text before them"
        )
    else:
        what = "in another way (--pdf, --no-images or another option of how files are read)"
    return f"it holds these documents, read {what}: all {kept:,} tokens would be read anew"


def _lost(saved: Sequence[Span], reading: Reading, common: int) -> list[Span]:
    """Those that are not there any more, by name or content; all of them where hardly anything is."""
    names, contents = {span.source for span in reading.spans}, {span.sha256 for span in reading.spans}

    def is_named(span: Span) -> bool:
        if _is_stdin(span.source):  # every pipe has this name: the same text, gone on with or changed late
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
