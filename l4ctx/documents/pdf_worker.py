"""What the confined process that runs pdfium does: text and images of pages.

pdfium may end the process at any moment: it aborts where memory is short. Imports no Pillow.

The document that pages are drawn from stays open between requests: one, until another is read or drawn from, or nobody
has asked for KEPT_SECONDS. Beside its bytes, pdfium holds what it has parsed and copied of it: _MOST_GROWTH and a page
at most, then it is opened anew.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import ModuleType
from typing import Any

from l4ctx.confinement.work import Last, Receive, Refusal, Send, Work
from l4ctx.documents.images import pixels_digest
from l4ctx.machine.memory import OwnMemory, give_back_free_memory

KEPT_SECONDS = 10.0  # reading a document again takes much less, even one of gigabytes

_FONTS = ("/usr/share/fonts", "/usr/share/X11/fonts", "/usr/local/share/fonts", "/System/Library/Fonts")
"""Where pdfium looks for the fonts that a document names and does not hold."""
_MOST_GROWTH = 16 << 20  # bytes

_LINE_ENDS = re.compile("\r\n|[\r\v\f]")
# U+FFFE stands for "-" and a line break within a word, and for characters without a meaning; U+00AD is invisible.
_NO_TEXT = re.compile("[\x00\u00ad\ufffe\uffff]")


class _PageError(Exception):
    """A page without a text or image: the reason, to follow its number."""


def work() -> Work:
    """Loads pdfium. Raises ImportError, and OSError where the library in it does not suit this machine."""
    try:
        importlib.import_module("pypdfium2")  # loads the library and initializes it
        pdfium = importlib.import_module("pypdfium2.raw")
    except OSError as error:
        raise OSError(f"pypdfium2 cannot be loaded: {error}") from None
    memory = OwnMemory()
    kept = _Kept(pdfium, memory)

    def serve(request: dict[str, Any], receive: Receive, send: Send) -> Last:
        if request["do"] == "read":
            kept.close()
            _read(pdfium, receive(), memory, request, send)
            give_back_free_memory()
            return {}, b""
        size, pixels = _drawn(pdfium, kept, request, receive, send)
        return {"size": size}, pixels

    return Work(serve, readable=_FONTS, kept=lambda: kept.bytes, rest_after=KEPT_SECONDS, rest=kept.close)


class _Document:
    """A document in memory, open in pdfium. No form is started: nothing in it is ever run."""

    def __init__(self, pdfium: ModuleType, raw: bytes, memory: OwnMemory) -> None:
        """Raises Refusal."""
        self.raw = raw  # must be kept until it is closed
        self._pdfium, self._memory = pdfium, memory
        self._open()

    def _open(self) -> None:
        pdfium = self._pdfium
        self.handle = pdfium.FPDF_LoadMemDocument64(self.raw, len(self.raw), None)
        if not self.handle:
            error = pdfium.FPDF_GetLastError()
            if error == pdfium.FPDF_ERR_PASSWORD:
                raise Refusal("encrypted: it needs a password")
            if error == pdfium.FPDF_ERR_SECURITY:
                raise Refusal("encrypted in a way that pdfium does not know")
            raise Refusal("a broken PDF: pdfium finds no document in it")
        self.has_form = pdfium.FPDF_GetFormType(self.handle) not in (-1, pdfium.FORMTYPE_NONE)
        self._held_at_first = self._memory.anonymous()

    def close(self) -> None:
        if self.handle:
            self._pdfium.FPDF_CloseDocument(self.handle)
        self.handle = None
        give_back_free_memory()

    def slim(self) -> None:
        """Opens it anew where pdfium has copied much of it: streams of every page seen stay until it is closed."""
        if self._memory.anonymous() - self._held_at_first > _MOST_GROWTH:
            self.close()
            self._open()


class _Kept:
    """The document that pages are drawn from, if any, open from one request to the next."""

    def __init__(self, pdfium: ModuleType, memory: OwnMemory) -> None:
        self._pdfium, self._memory = pdfium, memory
        self._document: _Document | None = None
        self._key: object = None  # what tells it from others, and from what it was before

    @property
    def bytes(self) -> int:
        return 0 if self._document is None else len(self._document.raw)

    def document(self, key: object, receive: Receive, send: Send) -> _Document:
        """The document with that key, to be received where it is not here.

        Says when it has them, and only then opens them, which may take long. Raises Refusal.
        """
        try:
            if self._document is not None and key == self._key:
                send({"received": True})
                return self._document
            self.close()
            raw = receive()
            self._document, self._key = _Document(self._pdfium, raw, self._memory), key
        except Refusal as error:
            raise Refusal(_changed(error)) from None
        return self._document

    def close(self) -> None:
        document, self._document = self._document, None
        if document is not None:
            document.close()
            del document
            give_back_free_memory()


def _changed(error: Exception) -> str:
    """For a document or page that could be drawn at first."""
    return f"changed since it was first read ({error})"


def _read(pdfium: ModuleType, raw: bytes, memory: OwnMemory, request: dict[str, Any], send: Send) -> None:
    """The number of pages, and then a reply for every one from `first` (counted from 1) on, its text as the body."""
    with closing(_Document(pdfium, raw, memory)) as document:
        pages = pdfium.FPDF_GetPageCount(document.handle)
        if pages < 1:
            raise Refusal("a PDF without pages")
        send({"pages": pages, "attachments": max(pdfium.FPDFDoc_GetAttachmentCount(document.handle), 0)})
        for index in range(request["first"] - 1, pages):
            header: dict[str, Any] = {"fields": _undrawn_fields(pdfium, document, index)}
            text = ""
            try:
                with _loaded(pdfium, document, index) as page:
                    if request["mode"] != "pages":
                        text = _page_text(pdfium, page)
                        header["has_text"] = True
                        header["comments"] = 0 if text and not text.isspace() else _comments(pdfium, page)
                    if request["mode"] != "text":
                        size = _image_size(pdfium, document, index, request["longer_side"])
                        header["sha256"] = pixels_digest(*size, memoryview(_pixels(pdfium, page, *size)))
                        header["size"] = size
            except _PageError as error:
                header["failure"] = str(error)
            send(header, text.encode())
            if "failure" not in header:  # of these there may be many, and they leave nothing
                document.slim()


def _drawn(
    pdfium: ModuleType, kept: _Kept, request: dict[str, Any], receive: Receive, send: Send
) -> tuple[tuple[int, int], bytearray]:
    """The size and the pixels of a page that could be drawn before."""
    index = request["page"] - 1
    document = kept.document(request["key"], receive, send)
    try:
        with _loaded(pdfium, document, index) as page:
            size = _image_size(pdfium, document, index, request["longer_side"])
            pixels = _pixels(pdfium, page, *size)
    except _PageError as error:
        raise Refusal(_changed(error)) from None
    document.slim()
    return size, pixels


@contextmanager
def _loaded(pdfium: ModuleType, document: _Document, index: int) -> Iterator[Any]:
    """A page. What is filled into a form becomes a part of it, as if printed; in memory only."""
    page = pdfium.FPDF_LoadPage(document.handle, index)
    if page and document.has_form:
        pdfium.FPDFPage_Flatten(page, pdfium.FLAT_NORMALDISPLAY)
        pdfium.FPDF_ClosePage(page)
        page = pdfium.FPDF_LoadPage(document.handle, index)  # a page that is loaded does not notice
    if not page:
        raise _PageError("cannot be loaded")
    try:
        yield page
    finally:
        pdfium.FPDF_ClosePage(page)


def _undrawn_fields(pdfium: ModuleType, document: _Document, index: int) -> int:
    """How many form fields of a page have a value but no appearance, which only a form viewer draws."""
    count = 0
    if not document.has_form or not (page := pdfium.FPDF_LoadPage(document.handle, index)):
        return count
    try:
        for at in range(pdfium.FPDFPage_GetAnnotCount(page)):
            if annotation := pdfium.FPDFPage_GetAnnot(page, at):
                has_value, is_drawn = (pdfium.FPDFAnnot_HasKey(annotation, key) for key in (b"V", b"AP"))
                count += bool(has_value and not is_drawn)
                pdfium.FPDFPage_CloseAnnot(annotation)
    finally:
        pdfium.FPDF_ClosePage(page)
    return count


def _comments(pdfium: ModuleType, page: Any) -> int:
    """How many annotations of a page hold text, such as sticky notes."""
    count = 0
    for at in range(pdfium.FPDFPage_GetAnnotCount(page)):
        if annotation := pdfium.FPDFPage_GetAnnot(page, at):
            count += pdfium.FPDFAnnot_GetStringValue(annotation, b"Contents", None, 0) > 2  # the NUL in UTF-16
            pdfium.FPDFPage_CloseAnnot(annotation)
    return count


def _page_text(pdfium: ModuleType, page: Any) -> str:
    text_page = pdfium.FPDFText_LoadPage(page)
    if not text_page:
        raise _PageError("cannot be loaded")
    try:
        return _cleaned(_raw_text(pdfium, text_page))
    finally:
        pdfium.FPDFText_ClosePage(text_page)


def _raw_text(pdfium: ModuleType, text_page: Any) -> str:
    """All text of a page. A range that begins or ends with a character that is left out would lose others (crbug 2079).

    FPDFText_GetBoundedText is no substitute: it joins lines, and loses glyphs without an extent.
    """
    first, last = 0, pdfium.FPDFText_CountChars(text_page) - 1
    while first <= last and pdfium.FPDFText_GetTextIndexFromCharIndex(text_page, first) < 0:
        first += 1
    while first <= last and pdfium.FPDFText_GetTextIndexFromCharIndex(text_page, last) < 0:
        last -= 1
    if first > last:
        return ""
    begin, end = (pdfium.FPDFText_GetTextIndexFromCharIndex(text_page, at) for at in (first, last))
    count = last - first + 1
    units = (ctypes.c_ushort * (2 * max(count, end - begin + 1) + 1))()  # UTF-16, and a NUL at the end
    written = pdfium.FPDFText_GetText(text_page, first, count, units)
    return bytes(memoryview(units)[: max(written - 1, 0)]).decode("utf-16-le", "replace")


def _cleaned(text: str) -> str:
    """Lines end with a newline, words hyphenated at a line's end are whole, and there is nothing UTF-8 cannot hold."""
    return _NO_TEXT.sub("", _LINE_ENDS.sub("\n", text))


def _image_size(pdfium: ModuleType, document: _Document, index: int, longer_side: int) -> tuple[int, int]:
    """Width and height in pixels of the page's image: the CropBox as it is shown, rotated."""
    points = pdfium.FS_SIZEF()
    if not pdfium.FPDF_GetPageSizeByIndexF(document.handle, index, points):
        raise _PageError("cannot be loaded")
    width, height = float(points.width), float(points.height)
    if not (math.isfinite(width) and math.isfinite(height) and min(width, height) > 0):
        raise _PageError("cannot be drawn (without an area)")
    scale = longer_side / max(width, height)
    if min(width, height) * scale < 1:
        raise _PageError("cannot be drawn (too narrow)")
    return round(width * scale), round(height * scale)


def _pixels(pdfium: ModuleType, page: Any, width: int, height: int) -> bytearray:
    """The page as it is shown, with annotations, on white: rows from the top, and red, green, blue of a pixel."""
    pixels = bytearray(3 * width * height)
    buffer = (ctypes.c_ubyte * len(pixels)).from_buffer(pixels)
    bitmap = pdfium.FPDFBitmap_CreateEx(width, height, pdfium.FPDFBitmap_BGR, buffer, 3 * width)
    if not bitmap:
        raise _PageError("cannot be drawn")
    try:
        pdfium.FPDFBitmap_FillRect(bitmap, 0, 0, width, height, 0xFFFFFFFF)
        pdfium.FPDF_RenderPageBitmap(bitmap, page, 0, 0, width, height, 0, pdfium.FPDF_ANNOT)
    finally:
        pdfium.FPDFBitmap_Destroy(bitmap)
    pixels[0::3], pixels[2::3] = pixels[2::3], pixels[0::3]
    return pixels
