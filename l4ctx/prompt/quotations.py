"""Quotations in an answer, and where they stand in the documents: white space, hyphens and quotation marks forgiven."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from l4ctx.prompt.texts import KEPT, DocumentText, Place, PromptTexts, folded

LEAST_LETTERS = 4
"""Of a quotation: letters and digits. Shorter ones are single words in quotation marks."""

MOST_PLACES = 5
"""That are told of one quotation."""

_FENCED = re.compile(r"^ *```.*?(?:^ *```|\Z)", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r'"([^"\n]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|»([^«]+)«|「([^」]+)」|『([^』]+)』')
_BLOCK = re.compile(r"^> ?(.*(?:\n> ?.*)*)", re.MULTILINE)
_LEFT_OUT = re.compile(r"\[?(?:\.\.\.|…)\]?")
_MARKER = re.compile(r"\n> ?")


class Quotation(NamedTuple):
    """A quotation, where it is in the answer, and where it stands in the documents, first come first."""

    text: str
    start: int  # in characters
    stop: int
    places: list[Place]


def quoted(answer: str) -> Iterator[tuple[str, int, int]]:
    """The quotations of an answer: in quotation marks, and after `>`; not within fenced code. With their places."""
    text = _FENCED.sub(lambda found: "\0" * len(found[0]), answer)
    found = [(match[n], *match.span(n)) for match in _QUOTED.finditer(text) for n in [match.lastindex or 0]]
    found += [(_MARKER.sub("\n", match[1]), *match.span(1)) for match in _BLOCK.finditer(text)]
    for quotation, start, stop in sorted(found, key=lambda one: one[1]):
        if sum(character.isalnum() for character in quotation) >= LEAST_LETTERS:
            yield quotation.strip(), start, stop


def find_quotations(answer: str, texts: PromptTexts) -> list[Quotation]:
    """Looks up each quotation of an answer in all documents. A document's name in quotation marks is none."""
    names = {name for span in texts.spans for name in (span.source, span.source.rpartition("/")[2])}
    found = [Quotation(*one, places=[]) for one in quoted(answer) if one[0] not in names]
    if not found:
        return []
    parts = [_parts(quotation.text) for quotation in found]
    for number in range(len(texts.spans)):
        document = texts.document(number)
        for quotation, wanted in zip(found, parts, strict=True):
            if len(quotation.places) < MOST_PLACES and (here := _found(document.folded, wanted)) is not None:
                quotation.places.append(_place(document, here))
    return found


def _parts(quotation: str) -> list[str]:
    """What stands between ellipses, folded; without the punctuation that a sentence around it may have added."""
    parts = [folded(part) for part in _LEFT_OUT.split(quotation)]
    parts[-1] = parts[-1].rstrip(".,;:!?")
    return [part for part in parts if part]


def _found(text: str, parts: list[str]) -> tuple[int, int] | None:
    """Where the parts follow each other in a folded text."""
    start = at = 0
    for number, part in enumerate(parts):
        here = text.find(part, at)
        if here < 0:
            return None
        start, at = here if number == 0 else start, here + len(part)
    return (start, at) if parts else None


def _place(document: DocumentText, here: tuple[int, int]) -> Place:
    """Of characters of the folded text."""
    first, stop, kept, start = *here, 0, -1
    for run in KEPT.finditer(document.text):
        length = run.end() - run.start()
        if start < 0 and first < kept + length:
            start = run.start() + first - kept
        if stop <= kept + length:
            return document.characters(start, run.start() + stop - kept)
        kept += length
    raise AssertionError("not in the text that it was found in")
