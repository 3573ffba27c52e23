"""Paragraphs that a conversion has left out are put back: pandoc passes over text in some shapes and groups."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

LEAST = 5  # words that are worth a note where they are still missing
_WORD = re.compile(r"[^\W_]+")
_SLIDE = re.compile(r'^<slide number="(\d+)">$.*?^(?=</slide>$)', re.MULTILINE | re.DOTALL)


def restored(text: str, body: Sequence[tuple[int, str]]) -> tuple[str, list[str]]:
    """The text with the paragraphs of `body` that it lacks, at the end of their slides or of all, and notes on them.

    `body` has the paragraphs of the document itself, each with the number of its slide, or 0. One is lacking where over
    half of its words are not left in the text once those before it have taken theirs.
    """
    added = 0
    by_slide: dict[int, list[str]] = {}
    for slide, paragraph in body:
        by_slide.setdefault(slide, []).append(paragraph)

    def completed(part: str, paragraphs: Sequence[str]) -> str:
        nonlocal added
        lacking = _lacking(part, paragraphs)
        added += sum(len(_words(paragraph)) for paragraph in lacking)
        return part + "".join(f"{paragraph}\n\n" for paragraph in lacking)

    text = _SLIDE.sub(lambda match: completed(match.group(), by_slide.pop(int(match.group(1)), [])), text)
    if rest := [paragraph for paragraphs in by_slide.values() for paragraph in paragraphs]:
        ended = text if text.endswith("\n\n") or not text else f"{text}\n"
        text = whole if (whole := completed(ended, rest)) != ended else text
    notes = []
    if added:
        where = "their slides" if body[0][0] else "the text"
        notes.append(f"{added:,} words in shapes or groups, which pandoc leaves out, stand at the end of {where}")
    words = Counter(word for _, paragraph in body for word in _words(paragraph))
    missing = (words - Counter(_words(text))).total()
    if missing >= max(LEAST, words.total() // 100):
        notes.append(f"about {missing:,} of its {words.total():,} words are missing: save it as PDF")
    return text, notes


def _lacking(text: str, paragraphs: Sequence[str]) -> list[str]:
    left, lacking = Counter(_words(text)), list[str]()
    for paragraph in paragraphs:
        words = Counter(_words(paragraph))
        if words and 2 * (words - left).total() > words.total():
            lacking.append(" ".join(paragraph.split()))
        else:
            left -= words
    return lacking


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())
