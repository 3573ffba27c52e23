"""What a run did, as the object that --json prints: its answer, what was read, seconds by step, bytes by owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l4ctx.run.context import ReadContext
from l4ctx.run.session import Session

if TYPE_CHECKING:
    from l4ctx.spans import ImageSpan, Span


def run_report(session: Session) -> dict[str, Any]:
    """Bytes, seconds and tokens are plain numbers."""
    sized, answer = session.sized, session.answer
    inputs, folder = sized.inputs, session.request.context.folder
    answered: dict[str, Any] = answer.as_dict()
    if answer.citations is not None:
        answered["citations"] = answer.citations.as_dict()
    if (questions := session.request.questions) is not None:
        answered = {"answers": len(questions.questions), "taken_answers": questions.taken}
    return {
        **({**answered, "drafts": answer.drafts and answer.drafts.as_dict()} if session.request.asks else {}),
        "prompt_tokens": inputs.prompt_tokens,
        "reused_tokens": sized.reused,
        "context": str(folder) if folder else None,
        **_how_far(inputs.context),
        **_what_was_read(session),
        "skipped": [{"path": entry.source, "reason": entry.reason} for entry in inputs.skipped],
        "timings": {name: timing.as_dict() for name, timing in session.monitor.timings.items()},
        "memory": session.memory_report().as_dict(),
    }


def _how_far(context: ReadContext | None) -> dict[str, Any]:
    """Where the context is still being read: how many of its tokens are there, and how many it will have."""
    if context is None or context.reader.state.is_complete:
        return {}
    return {"context_is_partial": {"tokens": context.tokens, "of": context.reader.state.tokens}}


def _what_was_read(session: Session) -> dict[str, Any]:
    """Documents and images; where a context is answered from, first its own, an image by the name of its document."""
    inputs = session.sized.inputs
    context, end = inputs.context, inputs.prompt_tokens
    documents = [_read_of(span.source, span, end) for span in inputs.prompt.spans]
    images = [_read_of(placed.image.source, placed.span, end) for placed in inputs.prompt.images]
    if context is not None and session.request.answers_from_all:
        held, kept = context.documents(), context.tokens
        of_held = [
            (next((document.source for document in held if document.stop > span.start), ""), span)
            for span in context.images()
        ]
        documents = [_read_of(span.source, span, kept) for span in held if span.start < kept] + documents
        images = [_read_of(source, span, kept) for source, span in of_held if span.start < kept] + images
    return {"documents": documents, "images": images}


def _read_of(path: str, span: Span | ImageSpan, end: int) -> dict[str, Any]:
    """Its tokens before `end`; a context that is still being read may end within a document."""
    is_whole = span.stop <= end
    return {"path": path, "tokens": min(span.stop, end) - span.start} | ({} if is_whole else {"is_partial": True})
