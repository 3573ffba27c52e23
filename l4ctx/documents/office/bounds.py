"""How much a document may hold, counted before anything converts it: elements, their depth, and cells that are spanned.

A small file can hold millions of elements, each of which costs a conversion kilobytes and a fraction of a millisecond.
What a document unpacks to is bounded in `l4ctx.documents.office.archive`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from l4ctx.confinement.work import Refusal

MOST_ELEMENTS = 4_000_000  # of all parts: some 9,000 pages of a letter
MOST_CELLS = 30_000_000  # elements in the sheets of a workbook, which are read row by row
MOST_IN_ROW = 1_000_000
MOST_WORKBOOK = 500_000  # elements in parts of a workbook that are neither sheets nor strings
MOST_CONVERTED = 250_000  # elements that pandoc converts within its memory; of more, paragraphs are read
MOST_PAGE_ELEMENTS = 250_000  # of a web page, or of all those of a book
MOST_RTF_WORDS = 2_000_000  # control words and groups
MOST_RTF_PARAGRAPHS = 200_000  # and cells
MOST_DEPTH = 2000
MOST_TABLE_DEPTH = 50  # of tables in tables, each of which is laid out several times
MOST_SPACES = 1_000_000  # that an ODT says to repeat

_MOST_SPAN = 100  # columns or rows of a cell; pages say 100, or 1000, for "all"
_MOST_SPANNED = 4_000_000  # cells in all
_TAG = re.compile(
    rb"<(?:!--.*?(?:-->|\Z)|(script|style|textarea|title)\b.*?(?:</\1\s*>|\Z)|(/?)([a-z][a-z0-9]*))", re.I | re.S
)
_CELL = re.compile(rb"<t[dh]\b[^<>]{0,4000}", re.IGNORECASE)
_SPAN = re.compile(rb"((?:col|row)span\s*=\s*[\"']?\s*)(\d+)", re.IGNORECASE)
_ROW = re.compile(rb"<(?:\w+:)?row\b")
_LISTS = (b"ul", b"ol", b"dl")
_DEEP = frozenset((*_LISTS, b"table", b"div", b"blockquote", b"section", b"article"))
_RTF = re.compile(rb"\\(?:(par|cell|line|row)\b|[a-z]+)|([{}])")


def check_elements(count: int, most: int = MOST_ELEMENTS, where: str = "") -> None:
    """Raises Refusal."""
    if count > most:
        raise Refusal(f"it has more than {most:,} elements (paragraphs, cells, formats){where and ' '}{where}")


class PartCount:
    """Counts the elements of an archive's parts. `total` is of all."""

    def __init__(self) -> None:
        self.total = 0
        self._cells = self._strings = self._others = 0

    def count(self, name: str, pieces: Iterable[bytes]) -> None:
        """Raises Refusal."""
        is_sheet, in_row = name.startswith("xl/worksheets/"), 0
        for piece in pieces:
            found = _elements(piece)
            self.total += found
            if is_sheet:
                self._cells += found
                check_elements(self._cells, MOST_CELLS)
                rows = [match.start() for match in _ROW.finditer(piece)]
                in_row = _elements(piece[rows[-1] :]) if rows else in_row + found
                check_elements(in_row, MOST_IN_ROW, "in a row")
            elif name == "xl/sharedStrings.xml" or not name.startswith("xl/"):
                self._strings += found
                check_elements(self._strings)
            else:
                self._others += found
                check_elements(self._others, MOST_WORKBOOK, f"in {name}")


def _elements(xml: bytes) -> int:
    return xml.count(b"<") - xml.count(b"</")


def check_depth(depth: int) -> None:
    """Raises Refusal."""
    if depth > MOST_DEPTH:
        raise Refusal(f"its elements are nested more than {MOST_DEPTH:,} deep")


def bounded_page(page: bytes, before: int = 0) -> tuple[bytes, int]:
    """A web page that pandoc converts in bounded time, and its elements with `before`, those of other pages of a book.

    Lists that are never closed are closed at its end, as pandoc's time would double with each; and cells span 100
    columns or rows at most. Raises Refusal.
    """
    count, open_elements = before, Counter[bytes]()
    for match in _TAG.finditer(page):
        name = match.group(3)
        if name is None:
            continue
        if match.group(2):
            if open_elements[name.lower()]:
                open_elements[name.lower()] -= 1
            continue
        count += 1
        check_elements(count, MOST_PAGE_ELEMENTS)
        if (name := name.lower()) in _DEEP:
            open_elements[name] += 1
            check_depth(open_elements[name])
            if open_elements[b"table"] > MOST_TABLE_DEPTH:
                raise Refusal(f"it has tables within tables, more than {MOST_TABLE_DEPTH} deep")
    page = _with_bounded_spans(page)
    return page + b"".join(b"</%s>" % name * open_elements[name] for name in _LISTS), count


def _with_bounded_spans(page: bytes) -> bytes:
    spanned = 0

    def bounded(match: re.Match[bytes]) -> bytes:
        nonlocal spanned
        cells = 1

        def span(given: re.Match[bytes]) -> bytes:
            nonlocal cells
            taken = min(int(given.group(2)[:9]), _MOST_SPAN)
            cells *= max(1, taken)
            return given.group(1) + b"%d" % taken

        cell = _SPAN.sub(span, match.group())
        spanned += cells if cells > 1 else 0
        if spanned > _MOST_SPANNED:
            raise Refusal(f"cells of its tables span more than {_MOST_SPANNED:,} cells")
        return cell

    return _CELL.sub(bounded, page)


def check_rich_text(raw: bytes) -> None:
    """Raises Refusal for RTF with too many words, or groups nested too deep."""
    depth = count = paragraphs = 0
    for match in _RTF.finditer(raw):
        count += 1
        paragraphs += match.group(1) is not None
        if (brace := match.group(2)) is not None:
            depth = depth + 1 if brace == b"{" else max(0, depth - 1)
            check_depth(depth)
    if count > MOST_RTF_WORDS:
        raise Refusal(f"it has more than {MOST_RTF_WORDS:,} control words and groups")
    if paragraphs > MOST_RTF_PARAGRAPHS:
        raise Refusal(f"it has more than {MOST_RTF_PARAGRAPHS:,} paragraphs and cells")
