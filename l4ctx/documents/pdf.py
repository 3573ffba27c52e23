"""Pages of a PDF as text and as images, by pdfium (the extra `l4ctx[pdf]`), which runs in a process of its own.

`l4ctx.documents.pdf_process` starts and ends that process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING

from l4ctx.confinement.process import Body, LibraryMissingError, NoChildError, OpenFile, RefusedError, Reply
from l4ctx.documents.images import DocumentImage, ImageError, pixels_digest
from l4ctx.documents.pdf_process import MOST_LEFT, MOST_TEXT, PdfiumError, no_process, request
from l4ctx.formatting import counted, human_bytes
from model.folder import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

PDF_MODES = ("text", "pages", "both")  # each page's text, its image, or its text and then its image
PAGE_PIXELS = 1344  # the longer side of a page's image: 4 tiles of 336
DOCUMENT_SECONDS = 600.0  # for reading a document, and for every page
SECONDS_A_PAGE = 1.0  # on top; what is left of the document after that is not read
MOST_DECODED = 384 << 20  # bytes that pdfium is assumed to need for a page, see `page_bytes`

_HEADER_BYTES = 1024  # readers look for the header in so many bytes
_HEADER = re.compile(rb"(?:\A\s*|[^\x20-\x7e])%PDF-")  # within a line of text it is a mere mention
_VERSION = re.compile(rb"%PDF-\d\.\d\s*(?:[\r\n]|\Z)")
_OBJECT = re.compile(rb"(?:\A|[\r\n\0 ])\d{1,10} \d{1,5} obj\b")
_FIELD = re.compile(  # of an email, a form or an HTTP response; or a boundary, or the size of a chunk
    rb"--|[A-Za-z][A-Za-z0-9-]*:|[ \t]+\S|HTTP/[0-9.]+ |[A-Z]+ \S+ HTTP/|[0-9A-Fa-f]{1,8}\s*$"
)
_CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1f\x7f]")
_START_XREF = re.compile(rb"startxref\s+(\d{1,12})\s+%%EOF")
_TABLE = re.compile(rb"\s*(?:xref\s|\d+ \d+ obj\b)")
_NAMED_RANGES = 5  # of page numbers in a note; further ones are only counted
_MOST_LOST = 3  # pages of a document that end the process; each may take a minute before


class PdfError(Exception):
    """A PDF document cannot be read; the message is the reason in one line, without the document's name."""


class PdfSupportMissing(PdfError):
    """pypdfium2 is not installed."""

    def __init__(self) -> None:
        super().__init__('a PDF document; pip install "l4ctx[pdf]" adds what reads it')


def is_pdf(raw: bytes) -> bool:
    """Whether these bytes are a PDF: its header is within the first 1024, as readers accept it.

    Text that mentions `%PDF-`, or quotes the source of a PDF, is text. So what comes before the header decides how much
    else has to be there: nothing but blanks, hardly anything; header fields of a mail or a form, or bytes that are no
    text, the objects of a PDF and its end; text, also a table at the place that the end names.
    """
    most = _HEADER_BYTES + len(b"%PDF-")
    if raw.find(b"%PDF-", 0, most) < 0 or (header := _HEADER.search(raw[:most])) is None:
        return False
    at = header.end() - len(b"%PDF-")
    before = raw[:at].removeprefix(b"\xef\xbb\xbf").strip()
    if not before:
        return _VERSION.match(raw, at) is not None or _OBJECT.search(raw, at) is not None
    if _OBJECT.search(raw, at) is None:
        return False
    if _CONTROLS.search(before) or not _is_utf8(before):
        return True
    end = raw.rfind(b"%%EOF")
    after = raw[end + len(b"%%EOF") :].strip(b"\0 \t\r\n")
    if all(_FIELD.match(line) for line in before.splitlines() if line.strip()):
        return end > at and (not after or after.startswith(b"--"))
    return end > at and not after and (_names_its_table(raw, at) or not _is_utf8(raw[at:]))


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _names_its_table(raw: bytes, at: int) -> bool:
    """Whether the last `startxref` of a PDF that begins at `at` leads to a table of references, or to an object."""
    starts = _START_XREF.findall(raw, at)
    places = (int(starts[-1]), at + int(starts[-1])) if starts else ()
    return any(_TABLE.match(raw, place) for place in places)


def check_support() -> None:
    """Raises PdfSupportMissing if pypdfium2 is not installed."""
    if importlib.util.find_spec("pypdfium2") is None:
        raise PdfSupportMissing


def read_pdf(source: str, raw: bytes, path: str | None, *, mode: str) -> tuple[list[str | DocumentImage], list[str]]:
    """The content of the PDF `raw`, pages in order, and notes on it (one line each).

    `mode` is one of PDF_MODES. Every page is wrapped in `<page number="1">` and `</page>` (counted from 1) on lines of
    their own; one that cannot be read is left out and noted. Text is all that the page holds, whether visible or
    not, in the order in which the page draws it. An image's longer side has PAGE_PIXELS pixels; it is drawn once for
    its digest, and again when it is decoded, from the file at `path`, where the page must still show the same, or from
    `raw` where `path` is None.
    Pages that are not read within DOCUMENT_SECONDS and SECONDS_A_PAGE for each (and the page that is being read then)
    are noted as well. Raises PdfError where nothing can be read: encrypted, broken, no page, in mode text no text, or
    pdfium failing on _MOST_LOST pages (it crashes, needs too much memory, or more than
    l4ctx.documents.pdf_process.PAGE_SECONDS); PdfSupportMissing.
    """
    if mode not in PDF_MODES:
        raise ValueError(f"mode is {mode!r}, not one of {', '.join(PDF_MODES)}")
    check_support()
    read = _Read(_File(source, raw, path), mode)
    try:
        read.all_pages(raw)
    except RefusedError as error:
        raise PdfError(str(error)) from None
    except LibraryMissingError:
        raise PdfSupportMissing from None
    except NoChildError as error:
        raise PdfError(f"a PDF document, but {no_process(error)}") from None
    return read.content, read.notes()


def page_bytes(document_bytes: int) -> int:
    """Bytes of memory that drawing a page takes at most, in this process and in pdfium's together, while it lasts.

    That is MOST_LEFT (what pdfium's process holds between pages), the document's bytes, three times the page's image
    (in that process, as received, and as Pillow holds it), and MOST_DECODED: the page's own bytes, which pdfium copies,
    its fonts, and its images decoded. A document without a path is in this process before and after, too.
    Assumed is MOST_DECODED: a page that needs more may take it, up to `memory_limit`. Measured beside the document's
    bytes: 45 MiB for pages of text; for scanned ones of A4, 60 to 110 as JPEG, and at 600 dpi 315 as RGB with a mask
    and 340 as JPEG 2000; for A3 at 850 dpi as JPEG, 170.
    """
    return MOST_LEFT + document_bytes + 3 * 4 * PAGE_PIXELS**2 + MOST_DECODED


class _File:
    """A document from which pages are drawn."""

    def __init__(self, source: str, raw: bytes, path: str | None) -> None:
        self._source = source
        self._path = path
        self._raw = raw if path is None else b""  # a file is read anew
        self._bytes = len(raw)

    def image(self, number: int, width: int, height: int, sha256: str) -> DocumentImage:
        """The image of a page whose pixels have this digest."""
        name = f"{self._source}, page {number}"

        def decode() -> Image:
            try:
                return self._drawn(number, sha256)
            except NoChildError as error:
                raise ImageError(f"{name}: {no_process(error)}") from None
            except (RefusedError, PdfiumError) as error:
                raise ImageError(f"{name}: {error}") from None

        return DocumentImage(name, sha256, width, height, decode, page_bytes(self._bytes))

    def _drawn(self, number: int, sha256: str) -> Image:
        from PIL import Image

        try:
            reply = self._page(number)
        except PdfiumError as error:
            if not error.try_again:
                raise
            reply = self._page(number)
        width, height = reply.header["size"]
        if pixels_digest(width, height, memoryview(reply.body)) != sha256:
            raise RefusedError("changed since it was first read")
        return Image.frombytes("RGB", (width, height), reply.body)

    def _page(self, number: int) -> Reply:
        if self._path is None:
            return self._page_of(self._raw, len(self._raw), self._sha256, number)
        try:
            with open_regular(self._path) as file:
                now = os.fstat(file.fileno())
                key = [self._path, now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns]
                return self._page_of(OpenFile(file, now.st_size), now.st_size, key, number)
        except OSError as error:
            raise RefusedError(f"cannot be read any more: {error.strerror}") from None

    def _page_of(self, body: Body, size: int, key: object, number: int) -> Reply:
        """`key` tells the document from others, and from what it was before."""
        header = {"do": "draw", "key": key, "page": number, "longer_side": PAGE_PIXELS}
        with request(header, body, size) as receive:
            return receive()

    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(self._raw).hexdigest()


@dataclass
class _Read:
    """What one `read_pdf` call has read, and what it could not read."""

    file: _File
    mode: str
    seconds: float = 0.0  # spent on it
    pages: int = 0  # 0 until the document could be opened
    next: int = 1  # number of a page
    text_bytes: int = 0
    lost: int = 0  # pages that ended the process
    content: list[str | DocumentImage] = field(default_factory=list)
    without_text: list[int] = field(default_factory=list)
    undrawn_fields: int = 0
    attachments: int = 0  # files within the document
    comments: int = 0  # annotations with text, on pages without
    failures: dict[str, list[int]] = field(default_factory=dict)  # reason -> numbers of pages

    def all_pages(self, raw: bytes) -> None:
        """Raises PdfError, RefusedError and NoChildError."""
        while not self.pages or self.next <= self.pages:
            if not self._has_time():
                self._leave_the_rest()
                return
            try:
                self._further_pages(raw)
            except PdfiumError as error:
                if not error.try_again:
                    self._lose_page(str(error))

    def _further_pages(self, raw: bytes) -> None:
        """Reads the pages that are left, in one process."""
        header = {
            "do": "read",
            "mode": self.mode,
            "first": self.next,
            "longer_side": PAGE_PIXELS,
        }
        with request(header, raw, len(raw)) as receive:
            opened = self._timed(receive).header
            self.pages, self.attachments = opened["pages"], opened["attachments"]
            while self.next <= self.pages:
                if not self._has_time():
                    return  # which ends the process
                self._add_page(self._timed(receive))
                self.next += 1
            receive()  # that the document is closed

    def _timed(self, receive: Callable[[], Reply]) -> Reply:
        began = monotonic()
        try:
            return receive()
        finally:
            self.seconds += monotonic() - began

    def _most_seconds(self) -> float:
        return DOCUMENT_SECONDS + SECONDS_A_PAGE * self.pages

    def _has_time(self) -> bool:
        return self.seconds <= self._most_seconds()

    def _leave_the_rest(self) -> None:
        reason = f"cannot be read (the document takes longer than {self._most_seconds():,.0f} s)"
        self.failures.setdefault(reason, []).extend(range(self.next, self.pages + 1))

    def _add_page(self, reply: Reply) -> None:
        number, header = self.next, reply.header
        self.undrawn_fields += header["fields"]
        if "failure" in header:
            self._fail(number, header["failure"])
        text: str | None = None
        image: DocumentImage | None = None
        if "has_text" in header:
            self.comments += header["comments"]
            self.text_bytes += len(reply.body)
            if self.text_bytes > MOST_TEXT:
                raise PdfError(f"a PDF with more than {human_bytes(MOST_TEXT)} of text")
            text = reply.body.decode()
            if not text or text.isspace():
                self.without_text.append(number)
        if "size" in header:
            width, height = header["size"]
            image = self.file.image(number, width, height, header["sha256"])
        if text is not None or image is not None:
            self.content += _wrapped(number, text, image)

    def _lose_page(self, reason: str) -> None:
        """Records a page that ended the process; raises PdfError if that was the document itself."""
        if not self.pages:
            raise PdfError(f"a PDF that {reason}")
        if self.next > self.pages:
            return  # when it was closed
        self._fail(self.next, reason)
        self.next += 1
        self.lost += 1
        if self.lost == _MOST_LOST < self.pages:
            raise PdfError(f"a PDF that is given up: {'; '.join(self._unread())}")

    def _fail(self, number: int, reason: str) -> None:
        self.failures.setdefault(reason, []).append(number)

    def _unread(self) -> list[str]:
        return [f"{self._count(numbers)} {reason}{_named(numbers)}" for reason, numbers in self.failures.items()]

    def notes(self) -> list[str]:
        """One line each; raises PdfError where there is no content."""
        notes = self._unread()
        if not self.content:
            raise PdfError(f"a PDF of which nothing can be read: {'; '.join(notes)}")
        if self.mode == "text" and len(self.without_text) + sum(map(len, self.failures.values())) == self.pages:
            raise PdfError("; ".join([self._without_text(), *notes]))
        if self.without_text:
            verb = "has" if len(self.without_text) == 1 else "have"
            hint = "; --pdf pages reads them as images" if self.mode == "text" else ""
            notes.append(f"{self._count(self.without_text)} {verb} no text (scanned?){_named(self.without_text)}{hint}")
        if self.undrawn_fields:
            notes.append(f"{self.undrawn_fields} form field(s) without an appearance are not read (print it to a PDF)")
        return notes

    def _without_text(self) -> str:
        """Why a document without text on its pages cannot be read as text."""
        if self.comments:
            return (
                f"a PDF without text but for {counted(self.comments, 'comment')} (sticky notes and the like); "
                "print it to a PDF with its comments"
            )
        if self.attachments:
            return (
                f"a PDF without text but with {counted(self.attachments, 'file')} attached (a portfolio?); save "
                "the attached files and name them"
            )
        return "a PDF without text (scanned?); --pdf pages reads its pages as images"

    def _count(self, numbers: list[int]) -> str:
        return f"{len(numbers)} of {self.pages} page{'s' * (self.pages > 1)}"


def _wrapped(number: int, text: str | None, image: DocumentImage | None) -> list[str | DocumentImage]:
    """A page between its tags, each on a line of its own."""
    head, tail = f'<page number="{number}">\n', "</page>\n"
    if text and not text.isspace():
        head += text if text.endswith("\n") else text + "\n"
    return [head + tail] if image is None else [head, image, "\n" + tail]


def _named(numbers: list[int]) -> str:
    """The numbers of pages behind a colon, neighbours as ranges, the first few ranges only: `: 1-4, 9, and 12 more`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    named = ["-".join(map(str, ends)) for ends in ranges[:_NAMED_RANGES]]
    if len(ranges) > _NAMED_RANGES:
        named.append(f"and {len(numbers) - numbers.index(ranges[_NAMED_RANGES][0])} more")
    return f": {', '.join(named)}"
