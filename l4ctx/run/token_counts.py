"""How many tokens each document has, by the checkpoint's tokenizer. Loads no weights, and needs none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4ctx.run.inputs import read_sources, tell_skipped
from l4ctx.run.request import SourceOptions
from model.config import TextConfig

if TYPE_CHECKING:
    from l4ctx.documents.document import Skipped


@dataclass
class Folder:
    """What lies below a folder. Names are in the order of reading."""

    tokens: int = 0
    number: int = 0  # documents
    folders: dict[str, Folder] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)

    def add(self, parts: Sequence[str], tokens: int) -> None:
        self.tokens += tokens
        self.number += 1
        if len(parts) == 1:
            self.documents[parts[0]] = tokens
        else:
            self.folders.setdefault(parts[0], Folder()).add(parts[1:], tokens)


@dataclass(frozen=True)
class TokenCounts:
    """Tokens with what is put around each document, as in a prompt."""

    documents: Sequence[tuple[str, int]]  # in the order of reading
    prompt_tokens: int  # of all, in a prompt with an empty question
    max_position_embeddings: int
    skipped: Sequence[Skipped]

    @property
    def total(self) -> int:
        """Of the documents alone."""
        return sum(tokens for _, tokens in self.documents)

    @property
    def largest_first(self) -> list[tuple[str, int]]:
        return sorted(self.documents, key=lambda document: -document[1])

    @property
    def tree(self) -> Folder:
        top = Folder()
        for source, tokens in self.documents:
            top.add(source.split("/"), tokens)
        return top

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.total,
            "prompt_tokens": self.prompt_tokens,
            "max_position_embeddings": self.max_position_embeddings,
            "documents": [{"path": source, "tokens": tokens} for source, tokens in self.documents],
            "skipped": [{"path": entry.source, "reason": entry.reason} for entry in self.skipped],
        }


def count_tokens(
    model: Path, options: SourceOptions, note: Callable[[str], None], tell: Callable[[str], None]
) -> TokenCounts:
    """Counts however many there are; `tell` is told what is being done, `note` what a user should know.

    Raises ConfigError, DocumentError, RequestError, TokenizerError, ImageProcessingError and PromptError.
    """
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.prompt.builder import build_prompt

    tell("reading files")
    config = TextConfig.from_folder(model)
    sources = read_sources(
        model, config, options, lambda count: tell(f"reading files: {count:,} documents"), is_limited=False
    )
    found = sources.documents
    found.require_any(options.paths)
    tell_skipped(found, note)
    template = ChatTemplate.from_folder(model)
    if template is not None:
        template.prepare()
    tokenizer = Tokenizer.from_folder(model, config.vocab_size)
    images = sources.images.prepare(tokenizer, None) if found.has_images else None
    prompt = build_prompt(
        tokenizer,
        template,
        found.take(),
        "",
        images=images.prompter if images else None,
        progress=lambda done, tokens: tell(f"tokenizing: {done:,} characters, {tokens:,} tokens"),
    )
    for text in prompt.notes:
        note(text)
    documents = [(span.source, span.stop - span.start) for span in prompt.spans]
    return TokenCounts(documents, len(prompt.ids), config.max_position_embeddings, found.skipped)
