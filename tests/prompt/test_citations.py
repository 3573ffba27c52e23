"""Sources of answers: documents decoded from token ids, quotations looked up, and lines that attention names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.prompt.attended import Answered, AttentionLog, attended, content_words, statements
from l4ctx.prompt.builder import build_prompt
from l4ctx.prompt.citations import Citing
from l4ctx.prompt.quotations import find_quotations, quoted
from l4ctx.prompt.texts import PromptTexts
from l4ctx.spans import ImageSpan, Span
from model.kernels.watch import Looked
from support.places import TINY

NOTES = "Not this.\r\nThe access code for the amber falcon is 48213.\nÜber die Brücke\n\nlast line without an end"
PAGES = (
    '<page number="1">\nFirst page, first line\n</page>\n'
    '<page number="2">\nA well-\nknown “harbour” of\n  two lines\n</page>\n'
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


def texts_of(tokenizer: Tokenizer, documents: Sequence[tuple[str, str]]) -> PromptTexts:
    prompt = build_prompt(tokenizer, None, [Document(name, "", text) for name, text in documents], "What?")
    return PromptTexts(tokenizer, prompt.spans, lambda start, stop: prompt.ids[start:stop])


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer) -> PromptTexts:
    return texts_of(tokenizer, [("notes.txt", NOTES), ("empty.txt", "\n"), ("report.pdf", PAGES)])


def position_of(texts: PromptTexts, number: int, words: str) -> int:
    """Of the first token of these words."""
    document = texts.document(number)
    return document.characters(start := document.text.index(words), start + len(words)).tokens.start


def test_documents_are_as_they_were_read(texts: PromptTexts) -> None:
    assert [texts.document(number).text for number in range(3)] == [NOTES, "\n", PAGES]
    assert texts.within == range(texts.spans[0].start, texts.spans[-1].stop)
    assert texts.number_at(texts.within.start - 1) is None and texts.number_at(texts.within.stop) is None


def test_every_token_stands_in_the_line_that_it_is_read_in(texts: PromptTexts) -> None:
    for number, text in enumerate((NOTES, "\n", PAGES)):
        document, lines = texts.document(number), text.split("\n")
        found = [document.line_of(position) for position in range(document.span.start, document.span.stop)]
        assert found[0] is None and found[-1] is None, "tags"
        inside = [line for line in found if line is not None]
        assert inside == sorted(inside) and set(inside) <= set(range(len(lines)))
        for line, content in enumerate(lines):
            assert line in inside or not content.strip()
            place = document.lines(line, line) if line <= document.last_line else None
            if place is not None:
                assert document.text[place.start : place.stop].rstrip("\n") == content


@pytest.mark.parametrize(
    ("number", "words", "place"),
    [
        (0, "48213", "notes.txt, line 2"),
        (0, "Brücke", "notes.txt, line 3"),
        (0, "last line", "notes.txt, line 5"),
        (0, "this.\r\nThe", "notes.txt, lines 1-2"),
        (2, "First", "report.pdf, page 1, line 1"),
        (2, "harbour", "report.pdf, page 2, line 2"),
    ],
)
def test_places_are_told_by_page_and_line(texts: PromptTexts, number: int, words: str, place: str) -> None:
    document = texts.document(number)
    start = document.text.index(words)
    found = document.characters(start, start + len(words))
    assert str(found) == place and document.text[found.start : found.stop] == words
    decoded = document.raw[
        document.ends[found.tokens.start - document.span.start - 1] : document.ends[
            found.tokens.stop - 1 - document.span.start
        ]
    ]
    assert words.encode() in decoded


def test_a_text_that_only_mentions_pages_has_none(tokenizer: Tokenizer) -> None:
    texts = texts_of(tokenizer, [("a.md", f"As in\n{PAGES}")])
    assert str(texts.document(0).lines(2, 2)) == "a.md, line 3"


def test_images_have_a_place_without_lines(tokenizer: Tokenizer, texts: PromptTexts) -> None:
    span = texts.spans[0]
    image = ImageSpan(span.start + 9, span.start + 12, "")
    with_image = PromptTexts(tokenizer, [span], lambda a, b: texts._ids(a, b), [image])
    document = with_image.document(0)
    assert document.line_of(span.start + 10) is None and document.image_at(span.start + 10) == image
    assert str(document.image(image)) == "notes.txt, an image"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('It says "the code is 48213".', ["the code is 48213"]),
        ("“One quotation” and «une autre» and „noch eine“", ["One quotation", "une autre", "noch eine"]),
        ("> a block\n> of two lines\n\nAnd more", ["a block\nof two lines"]),
        ('```\nprint("not a quotation")\n```\n"but this"', ["but this"]),
        ('An "a" is short, and it\'s no quotation', []),
    ],
)
def test_quotations_of_an_answer(answer: str, found: list[str]) -> None:
    assert [text for text, _, _ in quoted(answer)] == found
    for text, start, stop in quoted(answer):
        assert text.split("\n")[0] in answer[start:stop]


@pytest.mark.parametrize(
    ("quotation", "place"),
    [
        ("The access code for the amber falcon is 48213.", "notes.txt, line 2"),
        ("access  code\nfor the 'amber falcon'", "notes.txt, line 2"),
        ("this. The access", "notes.txt, lines 1-2"),
        ("A wellknown harbour of two lines", "report.pdf, page 2, lines 1-3"),
        ("The access code … is 48213", "notes.txt, line 2"),
        ("The access [...] Brücke", "notes.txt, lines 2-3"),
        ("Brücke ... The access", None),
        ("The access code for the amber falcon is 48214", None),
    ],
)
def test_quotations_are_found_whatever_their_spaces(texts: PromptTexts, quotation: str, place: str | None) -> None:
    (found,) = find_quotations(f"As “{quotation}” says.", texts)
    assert [str(one) for one in found.places] == ([] if place is None else [place])


def test_the_name_of_a_document_is_no_quotation(texts: PromptTexts) -> None:
    found = find_quotations('In "notes.txt" and <document path="report.pdf"> it says "notes.text".', texts)
    assert [(one.text, one.places) for one in found] == [("notes.text", [])]


def test_words_that_count() -> None:
    answer = "The code for the amber falcon is 48,213 and it's 5.5."
    words = [answer[word.start : word.stop] for word in content_words(answer, "What is the code for the amber falcon?")]
    assert words == ["48,213", "it's", "5.5"]
    assert [answer[word.start : word.stop] for word in content_words("The code", "Which code?")] == ["The code"[4:8]]
    text = "One. Two is 4.5 high! 「三。」\n- four\n"
    assert [text[part.start : part.stop] for part in statements(text)] == [
        "One. ",
        "Two is 4.5 high! ",
        "「三。」\n",
        "- four\n",
    ]


def look(*entries: tuple[int, int, float]) -> Looked:
    heads, positions, shares = zip(*entries, strict=True) if entries else ((), (), ())
    return Looked(torch.tensor(heads), torch.tensor(positions), torch.tensor(shares))


QUESTION = "What is the access code for the amber falcon?"
ANSWER = "The access code for the amber falcon is 48213."


def places_of(
    tokenizer: Tokenizer, texts: PromptTexts, share: float, *, question: str = QUESTION, usual: float = 0.0
) -> list[str]:
    """Where a head looks with this share for each token of the code, and with `usual` for every other one."""
    ids = tokenizer.encode_data(ANSWER).ids
    answer, log = Answered.of(tokenizer, ids), AttentionLog(texts.within)
    code = ANSWER.index("48213")
    target = position_of(texts, 0, "48213")
    for number, stop in enumerate(answer.ends):
        is_code = code < stop <= code + 5
        log.observe(3, 100 + number, look((1, target, share if is_code else usual)))
    return [str(one.place) for one in attended(log, answer, question, 100, texts)]


def test_attention_names_a_place(tokenizer: Tokenizer, texts: PromptTexts) -> None:
    assert places_of(tokenizer, texts, 0.8) == ["notes.txt, line 2"]
    assert places_of(tokenizer, texts, 0.5) == [], "spread"
    assert places_of(tokenizer, texts, 0.8, question=f"{QUESTION} For rhubarb?") == [], "which is not about it"
    assert places_of(tokenizer, texts, 0.995, question=f"{QUESTION} For rhubarb?") == ["notes.txt, line 2"]
    assert places_of(tokenizer, texts, 0.99, usual=0.9) == [], "where the head always looks"


def test_an_answer_without_places_says_why(tokenizer: Tokenizer, texts: PromptTexts) -> None:
    citing = Citing(tokenizer, texts)
    ids = tokenizer.encode_data("It is “48213”, not “48214”.").ids
    found = citing.cite(ids, QUESTION, citing.log(), 100)
    assert [bool(one.places) for one in found.quoted] == [True, False]
    assert found.why_none is not None and "no layer" in found.why_none
    log = citing.log()
    log.observe(3, 100, look())
    why = citing.cite(ids, QUESTION, log, 100).why_none
    assert why is not None and "names no place" in why
    entry = found.as_dict()["quoted"][0]
    assert entry["places"][0]["lines"] == [2, 2] and entry["is_found"]
    start, stop = entry["places"][0]["characters"]
    assert NOTES[start:stop] == "48213"


def test_spans_of_a_context_that_ends_within_a_document(tokenizer: Tokenizer, texts: PromptTexts) -> None:
    span = texts.spans[0]
    cut = PromptTexts(tokenizer, [Span(span.source, span.start, span.stop - 12)], lambda a, b: texts._ids(a, b))
    assert NOTES.startswith(cut.document(0).text) and cut.document(0).text
