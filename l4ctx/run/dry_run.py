"""The exact prompt of a request: what the model would be given, token for token. Loads no weights.

It is what `make_inputs` makes for a run that computes, behind what a saved context holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from l4ctx.run.context import with_repair_hint
from l4ctx.run.inputs import Inputs
from l4ctx.spans import Span


@dataclass(frozen=True)
class ExactPrompt:
    """All token ids of a prompt, and where in them documents, images and the question are."""

    inputs: Inputs
    ids: array[int]
    documents: Sequence[Span]
    images: Sequence[tuple[str, int, int]]  # the document, or the image's own name; start and stop
    question: tuple[int, int] | None  # start and stop; None without one

    @classmethod
    def of(cls, inputs: Inputs) -> ExactPrompt:
        """Raises ContextError."""
        request, prompt, context = inputs.request, inputs.prompt, inputs.context
        ids, documents = array("i"), list[Span]()
        images = list[tuple[str, int, int]]()
        if context is not None and request.answers_from_all:
            kept = context.tokens
            with with_repair_hint(context.folder):
                ids = context.reader.context.ids(context.reader.state)[:kept]
            documents = [span for span in context.documents() if span.start < kept]
            images = [
                (next((span.source for span in documents if span.stop > image.start), ""), image.start, image.stop)
                for image in context.images()
                if image.start < kept
            ]
        ids += prompt.ids
        images += [(placed.image.source, placed.span.start, placed.span.stop) for placed in prompt.images]
        question = None
        if request.question is not None:
            question = prompt.documents_stop, prompt.question_stop
        return cls(inputs, ids, [*documents, *prompt.spans], images, question)

    def text(self) -> Iterator[str]:
        """The prompt in pieces, with control tokens as they are spelled."""
        return self.inputs.tokenizer.exact_text(self.ids)

    def as_dict(self) -> dict[str, Any]:
        """For --json, without the prompt itself: positions are in tokens, and `stop` is behind the last one."""
        folder = self.inputs.request.context.folder
        return {
            "prompt_tokens": len(self.ids),
            "documents": [
                {
                    "path": span.source,
                    "start": span.start,
                    "stop": min(span.stop, len(self.ids)),
                    "tokens": min(span.stop, len(self.ids)) - span.start,
                    "sha256": span.sha256,
                }
                for span in self.documents
            ],
            "images": [{"path": name, "start": start, "stop": stop} for name, start, stop in self.images],
            "question": self.question and {"start": self.question[0], "stop": self.question[1]},
            "context": str(folder) if folder else None,
            "skipped": [{"path": entry.source, "reason": entry.reason} for entry in self.inputs.skipped],
        }
