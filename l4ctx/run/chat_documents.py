"""Documents that are read within a conversation, as part of what the user says next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from l4ctx.documents.added import added_documents
from l4ctx.errors import RequestError
from l4ctx.formatting import counted
from l4ctx.prompt.builder import Prompt, add_documents
from l4ctx.run.chat import Chat
from l4ctx.run.inputs import read_sources
from l4ctx.run.monitor import Monitor
from l4ctx.run.session import Session
from l4ctx.spans import Span

if TYPE_CHECKING:
    from l4ctx.run.images import ImageReading


def encoded_documents(chat: Chat, paths: Sequence[str], monitor: Monitor) -> tuple[Prompt, ImageReading | None]:
    """Their tokens, and what images among them take; without those that the conversation holds already.

    Raises DocumentError, RequestError, CheckpointError, TokenizerError and PromptLengthError.
    """
    inputs, request = chat.session.sized.inputs, chat.session.request
    config, held = inputs.checked.whole, dict[str, Span]()
    monitor.tell("reading files")
    sources = read_sources(request.model, config, replace(request.sources, paths=paths))
    sources.documents.require_any(paths)
    if inputs.context is not None:
        held = {span.source: span for span in inputs.context.documents()}
    held |= {span.source: span for span in chat.said.spans}
    found = sources.documents.documents
    sources.documents.documents, known = added_documents(found, held)
    for entry in sources.documents.skipped:
        monitor.note(f"skipped {entry.source}: {entry.reason}")
    for entry in known:
        monitor.note(f"skipped {entry.source}: the conversation holds it already")
    for name in {document.source for document in sources.documents.documents} - {document.source for document in found}:
        monitor.note(f"{name.rpartition(' (')[0]} is not what it was when it was read before; it is added as {name}")
    if not sources.documents.documents:
        raise RequestError("nothing was added: the conversation holds all of it already")
    for text in sources.documents.notes:
        monitor.note(text)
    reading = None
    if sources.documents.has_images:
        reading = inputs.images or sources.images.prepare(inputs.tokenizer, sources.images.sources(), with_digests=True)
    prompt = Prompt(first_index=len(held) + 1)
    monitor.tell("tokenizing")
    add_documents(
        prompt,
        inputs.tokenizer,
        sources.documents.take(),
        reading.prompter if reading else None,
        None,
        config.max_position_embeddings,
    )
    for text in prompt.notes:
        monitor.note(text)
    images = f"{counted(len(prompt.images), 'image')}, " if prompt.images else ""
    monitor.note(f"{counted(len(prompt.spans), 'document')}, {images}{len(prompt.ids):,} tokens")
    return prompt, reading


def begin_reading(chat: Chat, prompt: Prompt, what: str, images: ImageReading | None) -> Session:
    """A session that reads the documents of `prompt`, which holds nothing else, into the user's next message; then call
    `Chat.end`. Raises what `Chat.read` raises."""
    before = chat.said.for_user
    return chat.read(before.with_documents(prompt, chat.first + len(before.ids)), what, images)
