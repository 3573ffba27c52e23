"""What sources are looked up in: the documents that a run has read, and those of its saved context."""

from __future__ import annotations

from array import array
from dataclasses import replace

from l4ctx.errors import RequestError
from l4ctx.prompt.citations import Citing
from l4ctx.prompt.texts import PromptTexts
from l4ctx.run.inputs import Inputs


def citing(inputs: Inputs) -> Citing:
    """Takes 4 bytes for each token that is in a saved context alone. Raises ContextError, and RequestError where
    there is nothing to cite."""
    prompt, context = inputs.prompt, inputs.context
    first = inputs.prompt_tokens - len(prompt.ids)
    spans, images = list(prompt.spans), prompt.image_spans
    held = array("i")
    if context is not None and inputs.request.answers_from_all:
        held = context.ids()[: context.tokens]
        known = [span for span in context.documents() if span.start < context.tokens]
        spans = [replace(span, stop=min(span.stop, context.tokens)) for span in known] + spans
        images = [span for span in context.images() if span.stop <= context.tokens] + images
    if not spans:
        raise RequestError("--cite: there are no documents to name")

    def ids(start: int, stop: int) -> array[int]:
        return held[start:stop] if stop <= len(held) else prompt.ids[start - first : stop - first]

    return Citing(inputs.tokenizer, PromptTexts(inputs.tokenizer, spans, ids, images))
