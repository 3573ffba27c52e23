"""Images within the prompt: which tokens, where, and the text around them."""

from __future__ import annotations

from array import array

import pytest
from PIL.Image import Image

from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.documents.images import DocumentImage
from l4ctx.prompt.builder import Prompt, build_prompt
from l4ctx.vision.prompter import ImagePrompter
from l4ctx.vision.tokens import ImageTokens
from support.places import TINY

PATCHES = 3


def _never() -> Image:
    raise AssertionError("a prompt decodes nothing")


def image(name: str, width: int, height: int) -> DocumentImage:
    return DocumentImage(name, name.encode().hex(), width, height, _never, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


@pytest.fixture(scope="module")
def prompter(tokenizer: Tokenizer) -> ImagePrompter:
    patch = tokenizer.special_id("<|patch|>")
    assert patch is not None
    return ImagePrompter(ImageProcessing(size=28), ImageTokens.from_tokenizer(tokenizer, PATCHES, patch), "made")


def spelled(rows: int, columns: int) -> str:
    """As the template language of checkpoints would have it."""
    tile = "<|patch|>" * PATCHES
    canvas = f"{'<|tile_x_separator|>'.join([tile] * columns)}<|tile_y_separator|>" * rows if rows * columns > 1 else ""
    return f"<|image_start|>{canvas}<|image|>{tile}<|image_end|>"


def encoded(tokenizer: Tokenizer, *parts: str) -> array[int]:
    """Parts that begin with a control token as such, others as data, each by itself."""
    ids = array("i")
    for part in parts:
        if part.startswith("<|"):
            ids.extend(tokenizer.encode_control(part))
        else:
            tokenizer.encode_data(part, into=ids)
    return ids


DOCUMENTS = [
    Document("notes.md", "", "A literal <|image|> is text.\n"),
    Document("chart.png", "", (image("chart.png", 28, 20),)),
    Document(
        "report.pdf",
        "",
        (
            '<page number="1">\nFirst words.\n',
            image("report.pdf, page 1", 56, 84),
            "\n</page>\n",
            '<page number="2">\n',
            image("report.pdf, page 2", 84, 28),
            "\n</page>\n",
        ),
    ),
]
EXPECTED = (
    '<document index="1" path="notes.md">\nA literal <|image|> is text.\n\n</document>\n\n',
    '<document index="2" path="chart.png">\n',
    spelled(1, 1),
    "\n</document>\n\n",
    '<document index="3" path="report.pdf">\n<page number="1">\nFirst words.\n',
    spelled(3, 2),
    '\n</page>\n<page number="2">\n',
    spelled(1, 3),
    "\n</page>\n\n</document>\n\n",
)


def expected(tokenizer: Tokenizer) -> array[int]:
    ids = array("i")
    for number, part in enumerate(EXPECTED):
        ids.extend(encoded(tokenizer, part) if number else tokenizer.encode_data(part).ids)
    return ids


def check_places(prompt: Prompt, tokenizer: Tokenizer) -> None:
    """Every image is where it is said to be, within its document."""
    start, end = (tokenizer.special_id(f"<|image_{side}|>") for side in ("start", "end"))
    names = ["chart.png", "report.pdf, page 1", "report.pdf, page 2"]
    assert [placed.image.source for placed in prompt.images] == names
    assert [tuple(placed.layout) for placed in prompt.images] == [(1, 1), (3, 2), (1, 3)]
    for placed, document in zip(prompt.images, (1, 2, 2), strict=True):
        span, around = placed.span, prompt.spans[document]
        assert (prompt.ids[span.start], prompt.ids[span.stop - 1]) == (start, end)
        assert around.start < span.start < span.stop < around.stop
    assert [span.source for span in prompt.spans] == [document.source for document in DOCUMENTS]
    assert len({span.sha256 for span in prompt.image_spans}) == 3


def test_images_and_pages_between_texts(tokenizer: Tokenizer, prompter: ImagePrompter) -> None:
    template = ChatTemplate.from_folder(TINY)
    prompt = build_prompt(tokenizer, template, DOCUMENTS, "What is it?", images=prompter)
    body = expected(tokenizer)
    begin = prompt.spans[0].start
    assert prompt.ids[begin : begin + len(body)] == body and prompt.documents_stop == begin + len(body)
    assert prompt.ids[prompt.documents_stop :][: len(tokenizer.encode_data("What is it?").ids)] == (
        tokenizer.encode_data("What is it?").ids
    )
    check_places(prompt, tokenizer)


def test_without_a_template_and_without_a_question(tokenizer: Tokenizer, prompter: ImagePrompter) -> None:
    prompt = build_prompt(tokenizer, None, DOCUMENTS, "", images=prompter)
    assert prompt.ids == array("i", [tokenizer.bos_id]) + expected(tokenizer)
    check_places(prompt, tokenizer)


def test_what_comes_before_an_image_does_not_depend_on_it(tokenizer: Tokenizer, prompter: ImagePrompter) -> None:
    whole = build_prompt(tokenizer, None, DOCUMENTS, "q", images=prompter)
    part = build_prompt(tokenizer, None, DOCUMENTS[:2], "q", images=prompter)
    assert whole.ids[: part.documents_stop] == part.ids[: part.documents_stop]
    assert part.image_spans == whole.image_spans[:1]


def test_progress_counts_the_characters_of_all_texts(tokenizer: Tokenizer, prompter: ImagePrompter) -> None:
    seen: list[int] = []
    build_prompt(
        tokenizer, None, DOCUMENTS, "q", images=prompter, progress=lambda characters, _: seen.append(characters)
    )
    assert seen == sorted(seen) and seen[-1] == sum(len(document.text) for document in DOCUMENTS)
