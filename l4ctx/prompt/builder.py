"""Builds the prompt: chat template, system prompt, documents and question as token ids, with one span per document.

Control tokens come only from the template's own text and from images; documents, their paths, the question and the
system prompt are encoded as data.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from l4ctx.checkpoint.chat_template import ChatTemplate, check_template
from l4ctx.checkpoint.pieces import LONGEST_PIECE
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.errors import TOO_LONG
from l4ctx.formatting import as_attribute, counted
from l4ctx.spans import Span
from model.errors import UserError

if TYPE_CHECKING:
    from l4ctx.documents.document import Document
    from l4ctx.documents.images import DocumentImage
    from l4ctx.prompt.wrapping import Wrapping
    from l4ctx.spans import ImageSpan
    from l4ctx.vision.prompter import ImagePrompter, PlacedImage

Progress = Callable[[int, int], None]  # document characters and prompt tokens so far

DOCUMENT_END = "\n</document>\n\n"
QUICKLY_COUNTED = 2**20
"""Tokens that are counted in about a second."""


class PromptLengthError(UserError):
    """The prompt has more tokens than the model has positions; the message names the largest documents."""

    exit_code = TOO_LONG


@dataclass(frozen=True)
class ForcedCut:
    """A place where a text had to be split for encoding although that may change the token ids there."""

    source: str
    offset: int  # in characters from the start of the document's text


@dataclass
class Prompt:
    """Token ids (4 bytes each), the spans in them, and notes for the user (one line each)."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    documents_stop: int = 0  # where the question begins: everything before depends on the documents alone
    spans: list[Span] = field(default_factory=list)
    images: list[PlacedImage] = field(default_factory=list)
    forced_cuts: list[ForcedCut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first_index: int = 1  # number of the first document
    question_stop: int = 0  # where the question ends

    def follow(self, tokens: int) -> None:
        """Places the prompt after a saved context of `tokens` tokens, which replaces everything before the documents
        (or before the question, if there are none). Positions then count from the context's start."""
        start = self.spans[0].start if self.spans else self.documents_stop
        del self.ids[:start]
        by = tokens - start
        self.documents_stop += by
        self.question_stop += by
        self.spans = [replace(span, start=span.start + by, stop=span.stop + by) for span in self.spans]
        self.images = [placed.moved(by) for placed in self.images]

    @property
    def image_spans(self) -> list[ImageSpan]:
        return [placed.span for placed in self.images]


def build_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    documents: Iterable[Document],
    question: str,
    *,
    images: ImagePrompter | None = None,
    system: str | None = None,
    progress: Progress | None = None,
    first_index: int = 1,
    positions: int | None = None,
    wrapping: Wrapping | None = None,
) -> Prompt:
    """Puts documents first and the question last into the chat template, or into plain text without one (base models).

    The ids up to the end of document k do not depend on anything after it. `documents` is consumed one at a time and no
    text is kept: with `DocumentSet.take()`, each text is freed once it is encoded. `images` is required if documents
    contain images. `first_index` is the first document's number, if others precede it. `wrapping` replaces what stands
    around documents and question. Raises PromptError,
    TokenizerError for text that the tokenizer cannot encode, and PromptLengthError as soon as the documents have over
    QUICKLY_COUNTED tokens and over twice as many as the model has `positions`.
    """
    prompt = Prompt(first_index=first_index)
    system = (system or "").strip()
    if template is None:
        check_template(tokenizer, None)
        if tokenizer.bos_id is not None:
            prompt.ids.append(tokenizer.bos_id)
        if system:
            tokenizer.encode_data(system, suffix="\n\n", into=prompt.ids, user="the system prompt")
        _add_user_content(prompt, tokenizer, documents, question, images, progress, positions, wrapping)
        return prompt
    parts = template.split(system=bool(system))
    own_texts = [tokenizer.encode_control(part) for part in parts[::2]]  # before any document, as this may fail
    for number, part in enumerate(parts):
        if number % 2 == 0:
            prompt.ids.extend(own_texts[number // 2])
        elif part == "system":
            tokenizer.encode_data(system, into=prompt.ids, user="the system prompt")
        else:
            _add_user_content(prompt, tokenizer, documents, question, images, progress, positions, wrapping)
    return prompt


def encode_question(tokenizer: Tokenizer, question: str, into: array[int]) -> None:
    """Raises TokenizerError."""
    tokenizer.encode_data(question.strip(), into=into, user="the question")


def after_question(tokenizer: Tokenizer, template: ChatTemplate | None, *, has_system_prompt: bool) -> array[int]:
    """The tokens that follow the question in every prompt. Raises PromptError and TokenizerError."""
    if template is None:
        return array("i")
    parts = template.split(system=has_system_prompt)
    return array("i", tokenizer.encode_control(parts[-1]) if parts[-1] != "user" else [])


def _check_far_too_long(prompt: Prompt, source: str, start: int, characters: int, positions: int) -> None:
    """Ends tokenizing once the documents have over twice as many tokens as the model has positions.

    Where counting takes more than a moment, the exact length is not worth the time. The first `characters` of the
    document `source`, whose first token is `start`, have been tokenized.
    """
    tokens = len(prompt.ids)
    if tokens > max(2 * positions, QUICKLY_COUNTED):
        before = f" and the {counted(len(prompt.spans), 'document')} before it" if prompt.spans else ""
        raise PromptLengthError(
            f"the first {characters:,} characters of {as_attribute(source)}{before} have {tokens:,} tokens, over twice "
            f"the model's {positions:,} positions (max_position_embeddings); "
            f"{_remedy([*prompt.spans, Span(source, start, tokens)])}"
        )


def _remedy(spans: Iterable[Span]) -> str:
    largest = sorted(spans, key=lambda span: span.start - span.stop)[:5]
    names = ", ".join(f"{as_attribute(span.source)} ({span.stop - span.start:,} tokens)" for span in largest)
    return f"leave out some of the largest documents: {names}" if largest else "shorten the question"


def check_length(prompt: Prompt, max_new_tokens: int, max_position_embeddings: int, tokens: int | None = None) -> None:
    """Raises PromptLengthError if prompt and answer need more positions than the model has. Never truncates.

    `tokens` is the whole prompt's length, if its first part is in a saved context.
    """
    tokens = len(prompt.ids) if tokens is None else tokens
    over = tokens + max_new_tokens - max_position_embeddings
    if over <= 0:
        return
    answer = f" and the answer may have {max_new_tokens:,}" if max_new_tokens > 1 else ""
    raise PromptLengthError(
        f"the prompt has {tokens:,} tokens{answer}: {over:,} more than the model's "
        f"{max_position_embeddings:,} positions (max_position_embeddings); {_remedy(prompt.spans)}"
    )


def _add_user_content(
    prompt: Prompt,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    question: str,
    images: ImagePrompter | None,
    progress: Progress | None,
    positions: int | None,
    wrapping: Wrapping | None,
) -> None:
    add_documents(prompt, tokenizer, documents, images, progress, positions, wrapping)
    prompt.documents_stop = len(prompt.ids)
    if wrapping is None:
        encode_question(tokenizer, question, prompt.ids)
    else:
        tokenizer.encode_data(
            question, prefix=wrapping.before_question, suffix=wrapping.behind, into=prompt.ids, user="the question"
        )
    prompt.question_stop = len(prompt.ids)


def add_documents(
    prompt: Prompt,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    images: ImagePrompter | None,
    progress: Progress | None,
    positions: int | None,
    wrapping: Wrapping | None = None,
) -> None:
    """Appends documents to what the user says, as `build_prompt` does. Raises TokenizerError and PromptLengthError."""
    done = 0  # characters
    for document in documents:  # not enumerate, which would keep a reference to the document
        length = sum(len(part) for part in document.parts if isinstance(part, str))
        around = _around(prompt, document) if wrapping is None else (wrapping.before[len(prompt.spans)], "")
        _add_document(prompt, tokenizer, document, around, images, progress and _offset_by(done, progress), positions)
        del document  # frees its text before the next one is read
        done += length


def _around(prompt: Prompt, document: Document) -> tuple[str, str]:
    """The texts before and behind the next document."""
    index = prompt.first_index + len(prompt.spans)
    return f'<document index="{index}" path="{as_attribute(document.source)}">\n', DOCUMENT_END


def _add_document(
    prompt: Prompt,
    tokenizer: Tokenizer,
    document: Document,
    around: tuple[str, str],
    images: ImagePrompter | None,
    progress: Progress | None,
    positions: int | None,
) -> None:
    start, done, cuts = len(prompt.ids), 0, list[int]()  # done: characters

    def add_text(text: str, prefix: str = "", suffix: str = "") -> None:
        nonlocal done

        def report(characters: int) -> None:
            if positions is not None:
                _check_far_too_long(prompt, document.source, start, done + characters, positions)
            if progress is not None:
                progress(done + characters, len(prompt.ids))

        encoded = tokenizer.encode_data(
            text, prefix=prefix, suffix=suffix, into=prompt.ids, progress=report, user=as_attribute(document.source)
        )
        cuts.extend(done + offset for offset in encoded.forced_cuts)
        done += len(text)

    opening, closing = around
    for before, image in _texts_before_images(document.parts):
        if image is None:
            add_text(before, opening, closing)
        else:
            assert images is not None, f"{document.source}: an image, and nothing to encode it"
            add_text(before, opening)
            prompt.images.append(images.encode(image, prompt.ids))
        opening = ""
    prompt.spans.append(
        Span(document.source, start, len(prompt.ids), document.sha256, document.reading, document.first_line)
    )
    prompt.forced_cuts += [ForcedCut(document.source, offset) for offset in cuts]
    if cuts:
        prompt.notes.append(_forced_cuts_note(document.source, tuple(cuts)))
    if document.payload is not None:
        tokens = document.payload.tokens(len(tokenizer.encode_data(document.payload.sample).ids))
        prompt.notes.append(
            f"{document.source}: {document.payload.what} left out, about {tokens:,} tokens (--keep-payload keeps all)"
        )


def _texts_before_images(parts: Iterable[str | DocumentImage]) -> Iterator[tuple[str, DocumentImage | None]]:
    """Yields each image with the text before it, and finally the text after the last image with None."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        else:
            yield "".join(texts), part
            texts = []
    yield "".join(texts), None


def _offset_by(done: int, progress: Progress) -> Progress:
    return lambda characters, tokens: progress(done + characters, tokens)


def _forced_cuts_note(source: str, offsets: tuple[int, ...]) -> str:
    times = "once" if len(offsets) == 1 else f"{len(offsets)} times"
    return (
        f"{as_attribute(source)}: an unbroken run of over {LONGEST_PIECE:,} characters was cut {times}, "
        f"first at character {offsets[0]:,}; a few tokens there may differ"
    )
