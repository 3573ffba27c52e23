"""Counts the words of office documents that l4ctx, pandoc and markitdown lose.

    python -m samples.evaluation.compare_office FOLDER [--report report.json]

Reads every DOCX, PPTX, XLSX, ODT, EPUB, HTML, RTF and EML file below FOLDER, by its suffix; archives of Python packages
(.tar.gz, as `pip download --no-deps --no-binary :all:` writes them) are looked into. A word counts as lost where the
output has it less often than the document, whose words are read independently: text of the zipped XML, `html.parser`,
Python's `email`; of RTF by `striprtf`, where it is installed, and else not at all. What a reader cannot read is named,
and so is what no reader was there for. pandoc writes GitHub's Markdown; markitdown takes part where it is installed.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from l4ctx.documents.office.convert import OfficeError, pandoc_path, read_office

FORMATS = ("docx", "pptx", "xlsx", "odt", "epub", "html", "rtf", "eml")
PARTS = {  # of an archive, that hold the document's text
    "docx": r"^word/(?:document|footnotes|endnotes)\d*\.xml$",
    "pptx": r"^ppt/(?:slides|notesSlides)/[^/]+\.xml$",
    "xlsx": r"^xl/(?:sharedStrings|worksheets/[^/]+)\.xml$",
    "odt": r"^content\.xml$",
    "epub": r"\.(?:xhtml|html?)$",
}
_SHOWN = {"docx": ("t",), "pptx": ("t",), "xlsx": ("t",), "odt": ("p", "h")}  # elements
_WORD = re.compile(r"[^\W_]+")
_MOST_SECONDS = 120


class UnreadError(Exception):
    """A file that a reader cannot read, with its reason."""


class _Text(HTMLParser):
    """The text of a page, but for scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def files(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name, format and bytes of each document."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        if path.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(path) as packed:
                for member in packed:
                    if member.isfile() and (format := _format(member.name)) and (file := packed.extractfile(member)):
                        yield f"{path.name}: {member.name}", format, file.read()
        elif format := _format(path.name):
            yield str(path.relative_to(folder)), format, path.read_bytes()


def _format(name: str) -> str | None:
    suffix = name.rpartition(".")[2].lower()
    return "html" if suffix in ("htm", "xhtml") else suffix if suffix in FORMATS else None


def words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def _page_text(raw: bytes) -> str:
    parser = _Text()
    parser.feed(raw.decode("utf-8", "replace"))
    return "".join(parser.parts)


def reference(format: str, raw: bytes) -> str:
    """The text of a document, read without any of the readers compared. Raises UnreadError."""
    try:
        if format == "html":
            return _page_text(raw)
        if format == "eml":
            message = email.message_from_bytes(raw, policy=email.policy.default)
            body = message.get_body(("plain", "html"))
            return "" if body is None else str(body.get_content())
        if format == "rtf":
            from striprtf.striprtf import rtf_to_text

            return str(rtf_to_text(raw.decode("latin-1"), errors="replace"))
        return _zipped(format, raw)
    except Exception as error:  # a broken file raises anything
        raise UnreadError(f"{type(error).__name__}: {error}") from None


def _zipped(format: str, raw: bytes) -> str:
    parts = []
    with zipfile.ZipFile(io.BytesIO(raw)) as packed:
        for name in packed.namelist():
            if not re.search(PARTS[format], name):
                continue
            if format == "epub":
                parts.append(_page_text(packed.read(name)))
                continue
            for element in ElementTree.fromstring(packed.read(name)).iter():
                if element.tag.rpartition("}")[2] in _SHOWN[format]:
                    parts.append("".join(element.itertext()) if format == "odt" else element.text or "")
                elif element.tag.rpartition("}")[2] in ("p", "tab", "br"):
                    parts.append("\n")
    return ("" if format in ("docx", "pptx") else "\n").join(parts)


def by_l4ctx(format: str, raw: bytes) -> str:
    try:
        return read_office(format, raw)[0]
    except OfficeError as error:
        raise UnreadError(str(error)) from None


def by_pandoc(format: str, raw: bytes) -> str:
    program = pandoc_path()
    if program is None or format == "eml":
        raise UnreadError("no reader")
    command = [program, "--sandbox", "--from", format, "--to", "gfm", "--wrap=none"]
    try:
        done = subprocess.run(command, input=raw, capture_output=True, timeout=_MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UnreadError(f"more than {_MOST_SECONDS} s") from None
    if done.returncode:
        raise UnreadError(done.stderr.decode("utf-8", "replace").strip()[:200])
    return done.stdout.decode("utf-8", "replace")


def by_markitdown(format: str, raw: bytes) -> str:
    from markitdown import MarkItDown

    with tempfile.NamedTemporaryFile(suffix=f".{format}") as file:
        file.write(raw)
        file.flush()
        try:
            return str(MarkItDown().convert(file.name).text_content)
        except Exception as error:  # of any of the libraries that it calls
            raise UnreadError(f"{type(error).__name__}: {error}"[:200]) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was lost of each file as JSON")
    args = parser.parse_args()
    readers: dict[str, Callable[[str, bytes], str]] = {"l4ctx": by_l4ctx, "pandoc": by_pandoc}
    try:
        import markitdown  # noqa: F401

        readers["markitdown"] = by_markitdown
    except ImportError:
        print("markitdown is not installed: without it")
    rows = [compared(name, format, raw, readers) for name, format, raw in files(args.folder)]
    if args.report is not None:
        args.report.write_text(json.dumps(rows, indent=1))
    show(rows, list(readers))


def compared(name: str, format: str, raw: bytes, readers: dict[str, Callable[[str, bytes], str]]) -> dict[str, object]:
    row: dict[str, object] = {"name": name, "format": format}
    try:
        there = words(reference(format, raw))
    except UnreadError as error:
        return row | {"unread": f"no independent reading: {error}"}
    row["words"] = there.total()
    for reader, read in readers.items():
        try:
            missing = there - words(read(format, raw))
            row[reader] = missing.total()
            row[f"{reader} lost"] = dict(missing.most_common(20))
        except UnreadError as error:
            row[reader] = f"not read: {error}"
    return row


def show(rows: list[dict[str, object]], readers: list[str]) -> None:
    """A table by format, then all files that some reader did not read."""
    print("| format | files | words |", " | ".join(f"lost by {reader}, of" for reader in readers), "|")
    print("|---|---|---|" + "---|" * len(readers))
    for format in FORMATS:
        of = [row for row in rows if row["format"] == format and "words" in row]
        cells = []
        for reader in readers:
            read = [row for row in of if isinstance(row[reader], int)]
            lost, total = (sum(int(str(row[key])) for row in read) for key in (reader, "words"))
            cells.append(f"{lost:,} of {total:,} in {len(read)}")
        print(
            f"| {format.upper()} | {len(of)} | {sum(int(str(row['words'])) for row in of):,} |", " | ".join(cells), "|"
        )
    for row in rows:
        for key in ("unread", *readers):
            if isinstance(row.get(key), str):
                print(f"{row['name']}: {key}: {row[key]}")


if __name__ == "__main__":
    main()
