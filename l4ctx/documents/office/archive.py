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
from l4ctx.formatting import counted, human_bytes

MOST_UNPACKED = 512 << 20  # bytes of all parts that are text
MOST_PARTS = 65536
_PIECE = 1 << 16
_TEXT_PARTS = re.compile(r"\.(?:xml|rels|xhtml|html?|opf|ncx|css|svg|vml)$|^mimetype$", re.IGNORECASE)
_MAIN = {"docx": "word/document.xml", "pptx": "ppt/presentation.xml", "xlsx": "xl/workbook.xml"}
_UNCOMPUTED = rb"<(?:\w+:)?f\b[^>]*(?:/>|>[^<]*</(?:\w+:)?f>)\s*(?:<(?:\w+:)?v\s*/>|<v></v>)?\s*</(?:\w+:)?c>"
_FALLBACK, _DELETED = (
    frozenset({"Fallback"}),
    frozenset({"tracked-changes", "annotation", "binary-data", "note-citation"}),
)


@dataclass
class Facts:
    """What the parts of a document say; `body` has its paragraphs, each with the number of its slide, or 0."""

    format: str
    losses: list[str] = field(default_factory=list)
    body: list[tuple[int, str]] = field(default_factory=list)


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
        self.names = [entry.filename for entry in entries]
        unpacked = sum(entry.file_size for entry in entries if _TEXT_PARTS.search(entry.filename))
        if unpacked > MOST_UNPACKED:
            raise Refusal(f"it unpacks to {human_bytes(unpacked)}, which is more than {human_bytes(MOST_UNPACKED)}")
        for (
            entry
        ) in entries:  # sizes may lie, and pandoc unpacks what is there: a part that does is broken by its checksum
            if _TEXT_PARTS.search(entry.filename):
                for _ in self._pieces(entry):
                    pass

    def _pieces(self, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        try:
            with self._zip.open(entry) as part:
                while piece := part.read(_PIECE):
                    yield piece
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError) as error:
            raise Refusal(f"it is broken: {entry.filename}: {error}") from None

    def read(self, name: str) -> bytes:
        return b"".join(self._pieces(self._zip.getinfo(name)))

    def matching(self, pattern: str) -> list[str]:
        return [name for name in self.names if re.search(pattern, name)]

    def count(self, pattern: str, what: bytes) -> int:
        """How often `what` occurs in the parts of these names."""
        return sum(len(re.findall(what, self.read(name))) for name in self.matching(pattern))


def look(archive: Archive) -> Facts:
    """Raises Refusal."""
    facts = Facts(_format(archive))
    looks = {"docx": _word, "pptx": _powerpoint, "xlsx": _excel, "odt": _opendocument}
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


def _word(archive: Archive, facts: Facts) -> None:
    for name in archive.matching(r"^word/document\d*\.xml$"):
        facts.body += [(0, text) for text in _paragraphs(archive.read(name), "t", _FALLBACK)]
    if any(
        any(_paragraphs(archive.read(name), "t", _FALLBACK)) for name in archive.matching(r"/(?:header|footer)\d*\.")
    ):
        facts.losses.append("headers and footers of pages")
    _add(facts, len(archive.matching(r"^word/charts/chart\d*\.xml$")), "chart")
    _add(facts, len(archive.matching(r"^word/embeddings/")), "embedded file")


def _powerpoint(archive: Archive, facts: Facts) -> None:
    for number, name in enumerate(_slides(archive), 1):
        facts.body += [(number, text) for text in _paragraphs(archive.read(name), "t", _FALLBACK)]
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
    return [name for name in slides if name in archive.names]


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
    content = archive.read("content.xml") if "content.xml" in archive.names else b""
    facts.body += [(0, text) for text in _paragraphs(content, None, _DELETED)]
    _add(facts, content.count(b"<office:annotation "), "comment")
    _add(facts, content.count(b"<text:changed-region"), "tracked change")
    objects = content.count(b"<draw:object ")
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


def _paragraphs(xml: bytes, tag: str | None, skipped: frozenset[str]) -> list[str]:
    """The text of elements `tag` (None: of all) by paragraph, without what is below the elements `skipped`.

    Expat bounds how far entities expand, and external ones are never read. Raises Refusal.
    """
    found, runs, inside = list[str](), list[str](), 0
    parser = ElementTree.iterparse(io.BytesIO(xml), events=("start", "end"))
    try:
        for event, element in parser:
            name = element.tag.rpartition("}")[2]
            if name in skipped:
                inside += 1 if event == "start" else -1
            if event == "start":
                continue
            if not inside:
                if tag is None:
                    runs.append("".join(element.itertext()) if name in ("p", "h") else "")
                elif name == tag and element.text:
                    runs.append(element.text)
            if name in ("p", "h", "tab", "br"):
                found.append("".join(runs))
                runs.clear()
            if name in skipped or name in ("p", "h", "tbl", "tr", "table-row"):
                tail, element.tail = element.tail, None
                element.clear()
                element.tail = tail
    except ElementTree.ParseError as error:
        raise Refusal(f"it is broken: {error}") from None
    return [text for text in found if text and not text.isspace()]
