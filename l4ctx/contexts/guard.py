"""Refuses to read documents into a context where that would discard what it holds of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

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

    `folders` are the folders that were walked, by the names of their documents: one of those that is no longer there
    was deleted. `left_out` tells why what has the name of a document is there, but was not read; None: it was, or is
    not there.
    """

    ids: memoryview
    spans: Sequence[Span]
    folders: Mapping[str, str]
    left_out: Callable[[str], str | None]
    has_system_prompt: bool
    attention_chunk_size: int


def check_loss(context: Context, reading: Reading) -> None:
    """Raises ContextError where the context holds documents that are not among those to be read, or where an option
    would make the same ones be read again. Raises DiskError where a context's list of documents is damaged.

    Documents that grew or changed are no loss, and a set of documents whose reading was interrupted is resumed. What
    was deleted in a folder is no loss, but for most of all that the context holds, and what was in a folder that is
    empty now, as without its disk. What is there and left out is a loss.
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
    if lost is not None:
        names = ", ".join(_described(span, reading) for span in lost.spans[:SHOWN_DOCUMENTS])
        more = f" and {len(lost.spans) - SHOWN_DOCUMENTS:,} more" if len(lost.spans) > SHOWN_DOCUMENTS else ""
        return f"{lost.what}, which would be lost: {names}{more}, in all {_tokens(lost.spans):,} tokens"
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
        what = "differently (--pdf, --no-images, --line-numbers or another option of how files are read)"
    return f"it holds these documents, read {what}: all {kept:,} tokens would be read again"


class _Loss(NamedTuple):
    what: str
    spans: list[Span]


def _lost(saved: Sequence[Span], reading: Reading, common: int) -> _Loss | None:
    """The saved documents that are gone, by name and content; all of them where few of them are left."""
    names, contents = {span.source for span in reading.spans}, {span.sha256 for span in reading.spans}

    def is_named(span: Span) -> bool:
        if _is_stdin(span.source):  # every pipe has this name: it is the same text if most of it is equal
            return common > (span.start + span.stop) // 2
        return span.source in names

    gone = [span for span in saved if span.sha256 not in contents and not is_named(span)]
    if left_out := [span for span in gone if reading.left_out(span.source) is not None]:
        return _Loss("it holds documents that are left out now", left_out)
    others = [span for span in gone if next(_folders_of(span, reading), None) is None]
    if not any(span.sha256 in contents for span in saved) and 2 * sum(map(is_named, saved)) < len(saved):
        others = list(saved)
    if others:
        return _Loss("it holds other documents", others)
    read = {folder for span in reading.spans for folder in _ancestors(span.source)}
    if emptied := [span for span in gone if _is_in_an_emptied_folder(span, reading, read)]:
        return _Loss("it holds documents of folders in which there is nothing to read now", emptied)
    if 2 * _tokens(gone) > _tokens(saved):
        return _Loss("most of what it holds is no longer there", gone)
    return None


def _folders_of(span: Span, reading: Reading) -> Iterator[str]:
    """The folders that were walked and have, or had, this document."""
    if not _is_stdin(span.source):
        yield from (folder for folder in reading.folders if not folder or span.source.startswith(f"{folder}/"))


def _is_in_an_emptied_folder(span: Span, reading: Reading, read: Set[str]) -> bool:
    """Whether the folder of a document that is gone is still there, and nothing in it was read. Of a folder that is
    gone itself, the one around it is looked at.
    """
    for folder in _folders_of(span, reading):
        for parent in _ancestors(span.source):
            if len(parent) < len(folder) or parent in read:
                break
            if os.path.isdir(os.path.join(reading.folders[folder], parent[len(folder) :].lstrip("/"))):
                return True
    return False


def _ancestors(source: str) -> Iterator[str]:
    """The folders that a document is in, the nearest one first."""
    while source:
        source = source.rpartition("/")[0]
        yield source


def _tokens(spans: Sequence[Span]) -> int:
    return sum(span.stop - span.start for span in spans)


def _described(span: Span, reading: Reading) -> str:
    reason = reading.left_out(span.source)
    return f"{span.source} ({span.stop - span.start:,} tokens{'' if reason is None else f'; {reason}'})"


def _is_stdin(source: str) -> bool:
    return source == "stdin" or source.startswith("stdin (")
