"""The documents of a prompt as text again, decoded from its token ids: where a token stands, by line and page.

So the text of a saved context is known, too, which holds ids alone.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from l4ctx.checkpoint.tokenizer import StreamDecoder, Tokenizer
from l4ctx.prompt.builder import DOCUMENT_END
from l4ctx.spans import ImageSpan, Span

MOST_HELD = 2**26
"""Bytes of documents' texts that are kept decoded."""

_FORGIVEN = r"\s\u00ad\u200b\-\u2010-\u2015\u2212\"'`\u2018-\u201f\u2039\u203a«»「」『』*_"
KEPT = re.compile(f"[^{_FORGIVEN}]+")
_DROPPED = re.compile(f"[{_FORGIVEN}]+")
_OPENING = re.compile(rb'<document index="\d+" path="[^"\n]*">\n')
_FIRST_PAGE = b'<page number="'
_PAGE = re.compile(rb'^<page number="(\d+)">\n', re.MULTILINE)


class Place(NamedTuple):
    """Lines of a document, counted from 1; of one with pages within a page. `first` is 0 in an image."""

    source: str
    page: int | None
    first: int
    last: int
    start: int  # in characters from the beginning of the document's text
    stop: int
    tokens: range  # positions in the prompt

    def __str__(self) -> str:
        page = "" if self.page is None else f", page {self.page}"
        if not self.first:
            return f"{self.source}{page}, an image"
        lines = f"line {self.first}" if self.first == self.last else f"lines {self.first}-{self.last}"
        return f"{self.source}{page}, {lines}"


@dataclass(frozen=True)
class DocumentText:
    """A document's tokens, decoded. `raw` has the tags around its text; `ends` is where each token ends in it."""

    span: Span
    raw: bytes
    ends: array[int]
    images: Sequence[ImageSpan] = ()

    @cached_property
    def body(self) -> range:
        """The bytes of `raw` that are the document's own."""
        opening = _OPENING.match(self.raw)
        start, end = opening.end() if opening else 0, DOCUMENT_END.encode()
        return range(start, max(start, len(self.raw) - len(end) if self.raw.endswith(end) else len(self.raw)))

    @cached_property
    def text(self) -> str:
        return self.raw[self.body.start : self.body.stop].decode("utf-8", "replace")

    @cached_property
    def folded(self) -> str:
        return folded(self.text)

    @cached_property
    def line_starts(self) -> array[int]:
        """Bytes of `raw` where lines of the text begin."""
        starts = array("q", [self.body.start])
        starts.extend(found.end() for found in re.finditer(rb"\n", self.raw) if self._is_within(found.end()))
        return starts

    @property
    def last_line(self) -> int:
        return len(self.line_starts) - 1

    @cached_property
    def pages(self) -> list[tuple[int, int]]:
        """Line, from 0, and number of each page that begins."""
        if not self.raw.startswith(_FIRST_PAGE, self.body.start):
            return []
        return [(self.line_at(found.start()), int(found[1])) for found in _PAGE.finditer(self.raw, *_ends(self.body))]

    def line_at(self, offset: int) -> int:
        """The line, from 0, of a byte of `raw`."""
        return max(0, bisect_right(self.line_starts, offset) - 1)

    def line_of(self, position: int) -> int | None:
        """The line, from 0, of a token of the prompt; None within an image, and in the tags around the text.

        Of a token that goes on into the next line it is that where its first letter or digit stands.
        """
        number = position - self.span.start
        start, stop = self.ends[number - 1] if number else 0, self.ends[number]
        if self.image_at(position) is not None or not (start < self.body.stop and stop > self.body.start):
            return None
        token = self.raw[start:stop]
        return self.line_at(max(self.body.start, start + len(token) - len(token.lstrip()) if token.strip() else start))

    def image_at(self, position: int) -> ImageSpan | None:
        return next((image for image in self.images if image.start <= position < image.stop), None)

    def lines(self, first: int, last: int) -> Place:
        """The place of these lines, from 0, the last one included."""
        begin = self.line_starts[first]
        end = self.line_starts[last + 1] if last + 1 < len(self.line_starts) else self.body.stop
        page, before = None, 1 - self.span.first_line
        if number := bisect_right(self.pages, (first, _LAST)):
            line, page = self.pages[number - 1]
            before = line + 1
        return Place(
            self.span.source,
            page,
            max(1, first - before + 1),
            max(1, last - before + 1),
            self._characters(begin),
            self._characters(end),
            self.tokens(begin, end),
        )

    def image(self, image: ImageSpan) -> Place:
        offset = self.ends[image.start - self.span.start]
        number = bisect_right(self.pages, (self.line_at(offset), _LAST))
        page, at = self.pages[number - 1][1] if number else None, self._characters(offset)
        return Place(self.span.source, page, 0, 0, at, at, range(image.start, image.stop))

    def characters(self, start: int, stop: int) -> Place:
        """The place of a part of `text`."""
        begin, end = (self.body.start + len(self.text[:n].encode("utf-8", "surrogatepass")) for n in (start, stop))
        place = self.lines(self.line_at(begin), self.line_at(max(begin, end - 1)))
        return place._replace(start=start, stop=stop, tokens=self.tokens(begin, end))

    def tokens(self, begin: int, end: int) -> range:
        """Positions of the tokens of these bytes."""
        first, stop = bisect_right(self.ends, begin), bisect_left(self.ends, end) + 1
        return range(self.span.start + first, self.span.start + min(stop, len(self.ends)))

    def _characters(self, offset: int) -> int:
        return len(self.raw[self.body.start : offset].decode("utf-8", "replace"))

    def _is_within(self, offset: int) -> bool:
        return self.body.start < offset < self.body.stop


def folded(text: str) -> str:
    """Without white space, hyphens, quotation marks and emphasis, in which a quotation may differ: what is `KEPT`."""
    return _DROPPED.sub("", text)


_LAST = 2**62


def _ends(part: range) -> tuple[int, int]:
    return part.start, part.stop


class PromptTexts:
    """The texts of all documents, decoded one at a time when they are wanted; the last ones are held."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        spans: Sequence[Span],
        ids: Callable[[int, int], Sequence[int]],
        images: Sequence[ImageSpan] = (),
    ) -> None:
        """`ids` gives the prompt's token ids from one position to another."""
        self.spans = sorted(spans, key=lambda span: span.start)
        self._tokenizer, self._ids, self._images = tokenizer, ids, images
        self._starts = [span.start for span in self.spans]
        self._bytes: dict[int, bytes] = {}  # of tokens
        self._held: OrderedDict[int, DocumentText] = OrderedDict()
        self._held_bytes = 0

    @property
    def within(self) -> range:
        """Positions from the first document to the last one."""
        return range(self.spans[0].start, self.spans[-1].stop) if self.spans else range(0)

    def number_at(self, position: int) -> int | None:
        """Which document a position is in."""
        number = bisect_right(self._starts, position) - 1
        return number if number >= 0 and position < self.spans[number].stop else None

    def text(self, place: Place) -> str:
        """The lines of a place, without the last line's end; empty for an image."""
        number = self.number_at(place.tokens.start)
        return "" if number is None else self.document(number).text[place.start : place.stop].rstrip("\r\n")

    def document(self, number: int) -> DocumentText:
        held = self._held.get(number)
        if held is not None:
            self._held.move_to_end(number)
            return held
        held = self._held[number] = self._decoded(self.spans[number])
        self._held_bytes += len(held.raw)
        while self._held_bytes > MOST_HELD and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= len(oldest.raw)
        return held

    def _decoded(self, span: Span) -> DocumentText:
        ids = self._ids(span.start, span.stop)
        parts = self._byte_level(ids) if self._tokenizer.byte_level else self._streamed(ids)
        images = [image for image in self._images if span.start <= image.start < span.stop]
        return DocumentText(span, b"".join(parts), array("q", accumulate(map(len, parts))), images)

    def _byte_level(self, ids: Sequence[int]) -> list[bytes]:
        known = self._bytes
        known.update((token, self._tokenizer.token_bytes(token)) for token in set(ids) - known.keys())
        return [known[token] for token in ids]

    def _streamed(self, ids: Sequence[int]) -> list[bytes]:
        decoder = StreamDecoder(self._tokenizer)
        parts = [decoder.push(token).encode() for token in ids]
        if parts:
            parts[-1] += decoder.finish().encode()
        return parts
