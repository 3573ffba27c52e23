"""What stands around documents and question in place of `<document>` elements: nothing, or a template of one's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from l4ctx.checkpoint.chat_template import PromptError, render_confined
from l4ctx.errors import InputError


class PromptTemplateError(InputError):
    """A template of one's own that cannot be used; the message says why."""


@dataclass(frozen=True)
class Wrapping:
    """A text before each document, that before the question (behind the last document), and that behind it."""

    before: Sequence[str]
    before_question: str = ""
    behind: str = ""

    @classmethod
    def none(cls, documents: int) -> Wrapping:
        """Documents and question as they are."""
        return cls([""] * documents)


def wrapping(source: str, names: Sequence[str]) -> Wrapping:
    """Renders a Jinja template, with `documents` (each with `name`, `text` and `index`, from 1) and `question`.

    In place of texts it is given markers, so that where each document begins and ends is known, and that what is in
    them has no meaning to it. It is sandboxed, and rendered in the confined process of chat templates. Raises
    PromptTemplateError where it fails, or does not show every document once, in order, and then the question.
    """
    start = "l4ctxText"
    while start in source or any(start in name for name in names):
        start += "q"
    markers = [f"{start}{number}z" for number in range(len(names) + 1)]
    documents = [
        {"name": name, "text": marker, "index": number}
        for number, (name, marker) in enumerate(zip(names, markers[1:], strict=True), 1)
    ]
    try:
        text = render_confined(source, {"documents": documents, "question": markers[0]}, "it")
    except PromptError as error:
        raise PromptTemplateError(f"--prompt-template: {error}") from None
    parts = re.split(f"({start}\\d+z)", text)
    if parts[1::2] != [*markers[1:], markers[0]]:
        shown = len(parts[1::2])
        raise PromptTemplateError(
            "--prompt-template: it has to show the text of every document once, in order, and then the question; it "
            f"shows {shown} of these {len(markers)} texts, or in another order"
        )
    own = parts[::2]
    return Wrapping(own[: len(names)], own[len(names)], own[-1])
