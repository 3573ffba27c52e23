"""Saves a conversation as a context: `ask` and `chat` go on from it as from documents that were read."""

from __future__ import annotations

from array import array
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cache.layout import StoreLayout
from l4ctx.errors import RequestError
from l4ctx.prompt.turns import SYSTEM
from l4ctx.run.chat import Chat
from l4ctx.run.context import with_repair_hint

if TYPE_CHECKING:
    from l4ctx.contexts.manifest import Recipe
    from l4ctx.contexts.writer import ContextWriter
    from l4ctx.spans import ImageSpan, Span


def save(chat: Chat, folder: Path) -> int:
    """Writes all that has been said and read into the folder; returns the number of tokens.

    The folder is new, or holds how this conversation began. All must have been read, see `chat_saying.settle`. Raises
    RequestError, ContextError, DiskError and DiskFullError.
    """
    from l4ctx.contexts.writer import ContextWriter

    ids, spans, images = _content(chat)
    recipe = _recipe(chat, folder)
    with with_repair_hint(folder), closing(ContextWriter(folder, recipe, chat.session.request.model)) as writer:
        _check_beginning(writer, ids)
        layout, cache = chat.session.sized.plan.layout, chat.cache
        has_system = chat.said.turns.roles[0] == SYSTEM
        writer.begin(memoryview(ids), spans, layout, system=has_system, images=images)
        if not writer.tip.is_complete:
            for row in range(len(writer.tip.blocks), layout.sealed_rows(cache.offset)):
                writer.write(row, cache.row_units(row))
            writer.finish(cache.offset, cache.tail)
    return len(ids)


def _content(chat: Chat) -> tuple[array[int], list[Span], list[ImageSpan]]:
    """All token ids, and the documents and images among them: first those of the context that was begun with."""
    said, context = chat.said, chat.session.sized.inputs.context
    images = [placed.span for placed in said.images]
    first = chat.first
    if not first:
        return said.ids, list(said.spans), images
    assert context is not None
    with with_repair_hint(context.folder):
        held = context.reader.context.ids(context.reader.state)[:first]
    spans = [
        span if span.stop <= first else replace(span, stop=first, sha256="")  # was read in part
        for span in context.documents()
        if span.start < first
    ]
    return held + said.ids, [*spans, *said.spans], [*(span for span in context.images() if span.stop <= first), *images]


def _recipe(chat: Chat, folder: Path) -> Recipe:
    """Raises RequestError where the conversation is computed otherwise than the context that it began with."""
    from l4ctx.checkpoint.fingerprint import fingerprint
    from model.weights.loading import checked_sources, stored_tensors
    from model.weights.quantizing import quantized_sources

    sized, request = chat.session.sized, chat.session.request
    inputs, plan = sized.inputs, sized.plan
    config, choices, layout = inputs.checked.whole, inputs.choices, plan.layout
    provenance = inputs.checked.provenance
    if not provenance:
        sources = quantized_sources(checked_sources(request.model, config), choices.compute.quantization)
        provenance = fingerprint(request.model, config, stored_tensors(sources))
    recipe = choices.recipe_for(provenance, layout, plan.prefill_chunk_size, sized.attention)
    own = StoreLayout.of(config, length=layout.length, dtype=layout.dtype, kv_dtype=layout.kv_dtype)
    if (own.block_tokens, own.segment_tokens) != (layout.block_tokens, layout.segment_tokens):
        raise RequestError(
            f"{folder}: the conversation is computed in {layout.dtype}, and {request.context.folder}, which it began "
            f"with, in {recipe.dtype}: to save it, begin with --dtype {recipe.dtype}"
        )
    date = chat.said.turns.template.date
    assert date is not None
    return replace(recipe, dtype=layout.dtype, date=date.isoformat())


def _check_beginning(writer: ContextWriter, ids: array[int]) -> None:
    """Raises RequestError where the folder holds something else, which would be lost."""
    from l4ctx.contexts.reuse import common_prefix

    for state in writer.context.usable:
        if common_prefix(writer.context.ids(state), ids) < state.tokens:
            raise RequestError(
                f"{writer.folder}: it holds something other than the beginning of this conversation; nothing was "
                "changed: name another folder"
            )
