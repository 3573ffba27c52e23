"""What a zipped office document holds, read without converting it: its format, what a conversion loses, and its words.

The words are what a conversion is compared with: pandoc leaves out text in some shapes without a word.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.etree import ElementTree

from l4ctx.confinement.work import Refusal
from l4ctx.documents.office.bounds import PartCount, bounded_page
from l4ctx.documents.office.paragraphs import paragraphs
from l4ctx.formatting import counted, human_bytes

MOST_UNPACKED = 512 << 20  # bytes of all parts that are text
MOST_PARTS = 65536
_PIECE = 1 << 16
_TEXT_PARTS = re.compile(r"\.(?:xml|rels|xhtml|html?|opf|ncx|css|svg|vml)$|^mimetype$", re.IGNORECASE)
_MAIN = {"docx": "word/document.xml", "pptx": "ppt/presentation.xml", "xlsx": "xl/workbook.xml"}
_UNCOMPUTED = rb"<(?:\w+:)?f\b[^>]*(?:/>|>[^<]*</(?:\w+:)?f>)\s*(?:<(?:\w+:)?v\s*/>|<v></v>)?\s*</(?:\w+:)?c>"
_CONTENT = r"^content\.xml$"
_LONGEST_MATCH = 1 << 16  # bytes of what is counted
_FALLBACK, _DELETED = (
    frozenset({"Fallback"}),
    frozenset({"tracked-changes", "annotation", "binary-data", "note-citation"}),
)


@dataclass
class Facts:
    """What the parts of a document say; `body` has its paragraphs, each with the number of its slide, or 0.

    `notes` are those of its foot- and endnotes and comments, and `elements` counts all that are in the archive.
    """

    format: str
    losses: list[str] = field(default_factory=list)
    body: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    elements: int = 0


class Archive:
    """The parts of a document that are text, each unpacked into memory when it is read, within MOST_UNPACKED."""

    def __init__(self, raw: bytes) -> None:
        """Raises Refusal for what is no archive, and for one that unpacks to too much."""
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(raw))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
            raise Refusal(f"it is broken: {error}") from None
        entries = self._zip.infolist()
        if len(entries) > MOST_PARTS:
            raise Refusal(f"it is broken: an archive of {len(entries):,} parts")
        if any(entry.flag_bits & 1 for entry in entries):
            raise Refusal("it is encrypted: save it without a password")
        self.names = list(dict.fromkeys(entry.filename for entry in entries))
        unpacked = sum(entry.file_size for entry in entries if _TEXT_PARTS.search(entry.filename))
        if unpacked > MOST_UNPACKED:
            raise Refusal(f"it unpacks to {human_bytes(unpacked)}, which is more than {human_bytes(MOST_UNPACKED)}")
        count = PartCount()
        for entry in entries:
            # sizes may lie, and pandoc unpacks what is there: a part that does is broken by its checksum
            if _TEXT_PARTS.search(entry.filename):
                count.count(entry.filename, self._pieces(entry))
        self.elements = count.total

    def pieces(self, name: str) -> Iterator[bytes]:
        return self._pieces(self._zip.getinfo(name))

    def _pieces(self, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        try:
            with self._zip.open(entry) as part:
                while piece := part.read(_PIECE):
                    yield piece
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError) as error:
            raise Refusal(f"it is broken: {entry.filename}: {error}") from None

    def read(self, name: str) -> bytes:
        return b"".join(self.pieces(name))

    def matching(self, pattern: str) -> list[str]:
        return [name for name in self.names if re.search(pattern, name)]

    def count(self, pattern: str, what: bytes) -> int:
        """How often `what`, within _LONGEST_MATCH, occurs in the parts of these names."""
        found = 0
        for name in self.matching(pattern):
            kept = b""
            for piece in self.pieces(name):
                kept, end = kept + piece, 0
                for match in re.finditer(what, kept):
                    found, end = found + 1, match.end()
                kept = kept[max(end, len(kept) - _LONGEST_MATCH) :]
        return found


def look(archive: Archive) -> Facts:
    """Raises Refusal."""
    facts = Facts(_format(archive), elements=archive.elements)
    looks = {"epub": _book, "docx": _word, "pptx": _powerpoint, "xlsx": _excel, "odt": _opendocument}
    if facts.format in looks:
        looks[facts.format](archive, facts)
    if archive.matching(r"vbaProject\.bin$|^Basic/|^Scripts/"):
        facts.losses.append("macros")
    return facts


def _format(archive: Archive) -> str:
    if "mimetype" in archive.names:
        kind = archive.read("mimetype")[:80]
        return "epub" if kind.startswith(b"application/epub") else "odt"
    for name, main in _MAIN.items():
        if main in archive.names or archive.matching(f"^{main[: main.index('/')]}/"):
            return name
    raise Refusal("it is neither DOCX, PPTX nor XLSX")


def _book(archive: Archive, facts: Facts) -> None:
    """Raises Refusal for pages that pandoc would not convert in bounded time."""
    count = 0
    if archive.count(r"\.opf$", rb"<(?:\w+:)?itemref\b") > len(archive.names):
        raise Refusal("it is broken: a chapter is listed twice")
    for name in archive.matching(r"\.(?:xhtml|html?)$"):
        page = archive.read(name)
        bounded, count = bounded_page(page, count)
        if len(bounded) > len(page):
            raise Refusal(f"it is broken: {name} has lists without an end")


def _word(archive: Archive, facts: Facts) -> None:
    for name in archive.matching(r"^word/document\d*\.xml$"):
        facts.body += [(0, text) for text in paragraphs(archive.pieces(name), "t", _FALLBACK)]
    for name in archive.matching(r"^word/(?:footnotes|endnotes|comments)\.xml$"):
        facts.notes += [(0, text) for text in paragraphs(archive.pieces(name), "t", _FALLBACK)]
    if any(
        any(paragraphs(archive.pieces(name), "t", _FALLBACK)) for name in archive.matching(r"/(?:header|footer)\d*\.")
    ):
        facts.losses.append("headers and footers of pages")
    _add(facts, len(archive.matching(r"^word/charts/chart\d*\.xml$")), "chart")
    _add(facts, len(archive.matching(r"^word/embeddings/")), "embedded file")


def _powerpoint(archive: Archive, facts: Facts) -> None:
    for number, name in enumerate(_slides(archive), 1):
        facts.body += [(number, text) for text in paragraphs(archive.pieces(name), "t", _FALLBACK)]
    _add(facts, len(archive.matching(r"^ppt/charts/chart\d*\.xml$")), "chart")
    _add(facts, archive.count(r"^ppt/comments/", rb"<p:cm[ >]"), "comment")
    _add(facts, len(archive.matching(r"^ppt/embeddings/")), "embedded file")


def _slides(archive: Archive) -> list[str]:
    """The parts of the slides, in their order in the presentation."""
    relations, presentation = "ppt/_rels/presentation.xml.rels", "ppt/presentation.xml"
    if relations not in archive.names or presentation not in archive.names:
        return []
    targets = {
        element.get("Id"): posixpath.normpath(posixpath.join("/ppt", element.get("Target", ""))).lstrip("/")
        for element in _elements(archive.read(relations))
        if element.tag.endswith("}Relationship")
    }
    slides = (
        targets.get(next((value for key, value in element.items() if key.endswith("}id")), None), "")
        for element in _elements(archive.read(presentation))
        if element.tag.endswith("}sldId")
    )
    names = frozenset(archive.names)
    found = [name for name in slides if name in names]
    if len(frozenset(found)) < len(found):
        raise Refusal("it is broken: a slide is listed twice")
    return found


def _excel(archive: Archive, facts: Facts) -> None:
    _add(facts, len(archive.matching(r"^xl/media/")), "picture")
    _add(facts, len(archive.matching(r"^xl/charts/chart\d*\.xml$")), "chart")
    _add(
        facts,
        archive.count(r"^xl/comments\d*\.xml$|^xl/comments/comment\d*\.xml$", rb"<(?:\w+:)?comment[ >]"),
        "comment",
    )
    empty = archive.count(r"^xl/worksheets/[^/]+\.xml$", _UNCOMPUTED)
    _add(
        facts,
        empty,
        "formula without a value (open it in a spreadsheet and save it)",
        "formulas without values (open it in a spreadsheet and save it)",
    )


def _opendocument(archive: Archive, facts: Facts) -> None:
    if "content.xml" in archive.names:
        facts.body += [(0, text) for text in paragraphs(archive.pieces("content.xml"), None, _DELETED)]
    _add(facts, archive.count(_CONTENT, rb"<office:annotation "), "comment")
    _add(facts, archive.count(_CONTENT, rb"<text:changed-region"), "tracked change")
    objects = archive.count(_CONTENT, rb"<draw:object ")
    _add(facts, objects, "embedded object (formula or chart)", "embedded objects (formulas or charts)")


def _add(facts: Facts, count: int, one: str, many: str | None = None) -> None:
    if count:
        facts.losses.append(counted(count, one) if many is None or count == 1 else f"{count:,} {many}")


def _elements(xml: bytes) -> Iterator[ElementTree.Element]:
    """Raises Refusal."""
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(xml)):
            yield element
    except ElementTree.ParseError as error:
        raise Refusal(f"it is broken: {error}") from None
