"""The process that runs pdfium: text and images of pages, for one request after the other on its standard input.

Starting it, ending it and limits of time are left to `l4ctx.pdf_process`, what becomes of the pages to `l4ctx.pdf`.
Imports neither torch nor Pillow. A request or reply is FRAME, a header in JSON and a body. pdfium may end the process
at any moment: it aborts where memory is short. Every other error ends it too, and its reader says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import math
import os
import re
import select
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO

from l4ctx.files import read_regular_file

try:
    import resource
except ImportError:  # not on every system; there, memory has no limit
    resource = None  # type: ignore[assignment]

FRAME = struct.Struct("!IQ")  # bytes of the header, bytes of the body

_LINE_ENDS = re.compile("\r\n|[\r\v\f]")
# U+FFFE stands for "-" and a line break within a word, and for characters without a meaning; U+00AD is invisible.
_NO_TEXT = re.compile("[\x00\u00ad\ufffe\uffff]")

_Send = Callable[..., None]  # a header, and a body if there is one


class _DocumentError(Exception):
    """A document that cannot be read: the reason."""


class _PageError(Exception):
    """A page without a text or image: the reason, to follow its number."""


def main() -> None:
    """Serves until standard input ends; at once then, even within a page."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):  # a line that a library prints must not come between replies
        os.dup2(nothing, standard)
    _end_with_reader(requests)
    _be_the_first_to_go()
    with open(requests, "rb") as source, open(replies, "wb") as target:

        def send(header: dict[str, Any], body: bytes = b"") -> None:
            raw = json.dumps(header).encode()
            target.write(FRAME.pack(len(raw), len(body)) + raw)
            target.write(body)
            target.flush()

        try:
            pdfium = _pdfium()
        except ImportError:
            send({"missing": True})
            return
        except OSError as error:  # the library in it does not suit this machine
            send({"error": f"pypdfium2 cannot be loaded: {' '.join(str(error).split())}"})
            return
        send({"ready": True})
        while _serve(pdfium, source, send):
            pass


def _pdfium() -> ModuleType:
    """pdfium's functions. The package that they come in loads the library and initializes it."""
    importlib.import_module("pypdfium2")
    return importlib.import_module("pypdfium2.raw")


def _end_with_reader(requests: int) -> None:
    """Ends this process when nobody can write requests any more: its reader ended, maybe while a page is drawn."""
    if not hasattr(select, "poll"):
        return
    hangup = select.poll()
    hangup.register(requests, 0)

    def wait() -> None:
        hangup.poll()
        os._exit(0)

    with suppress(RuntimeError):  # no thread to be had: then it ends after the page
        threading.Thread(target=wait, name="hangup", daemon=True).start()


def _be_the_first_to_go() -> None:
    """Where the machine's memory ends, Linux ends this process rather than its reader; a crash writes no core."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if resource is not None:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_memory(count: int) -> None:
    """Bytes of address space from now on. Lower limits, of the user's, stand."""
    if resource is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (count if most == resource.RLIM_INFINITY else min(count, most), most))


def _serve(pdfium: ModuleType, source: BinaryIO, send: _Send) -> bool:
    """One request; its last reply says so, and comes when the document is closed. False where there is no request."""
    frame = source.read(FRAME.size)
    if len(frame) < FRAME.size:
        return False
    header_bytes, body_bytes = FRAME.unpack(frame)
    request = json.loads(source.read(header_bytes))
    _limit_memory(request["memory"])
    raw = source.read(body_bytes)
    pixels = b""
    try:
        if request["path"] is not None:
            raw = _unchanged(request["path"], request["sha256"])
        send({"received": True})
        if request["do"] == "read":
            _read(pdfium, raw, request, send)
        else:
            pixels = _drawn(pdfium, raw, request)
        last: dict[str, Any] = {"last": True}
    except (_DocumentError, _PageError) as error:
        last = {"error": str(error), "last": True}
    del raw  # by the last reply it holds nothing
    send(last, pixels)
    return True


def _unchanged(path: str, sha256: str) -> bytes:
    """What is in the file, which has this digest."""
    try:
        raw, _ = read_regular_file(path)
    except OSError as error:
        raise _DocumentError(f"cannot be read any more: {error.strerror}") from None
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise _DocumentError("the file changed after it was read")
    return raw


def _read(pdfium: ModuleType, raw: bytes, request: dict[str, Any], send: _Send) -> None:
    """The number of pages, and then a reply for every one from `first` (counted from 1) on, its text as the body."""
    with _opened(pdfium, raw) as document:
        pages = pdfium.FPDF_GetPageCount(document.handle)
        if pages < 1:
            raise _DocumentError("a PDF without pages")
        send({"pages": pages})
        for index in range(request["first"] - 1, pages):
            header: dict[str, Any] = {"fields": _undrawn_fields(pdfium, document, index)}
            text = ""
            try:
                with _loaded(pdfium, document, index) as page:
                    if request["mode"] != "pages":
                        text = _page_text(pdfium, page)
                        header["has_text"] = True
                    if request["mode"] != "text":
                        size = _image_size(pdfium, document, index, request["longer_side"])
                        _pixels(pdfium, page, *size)  # as it will be: to be sure that it can be drawn
                        header["size"] = size
            except _PageError as error:
                header["failure"] = str(error)
            send(header, text.encode())


def _drawn(pdfium: ModuleType, raw: bytes, request: dict[str, Any]) -> bytes:
    with _opened(pdfium, raw) as document, _loaded(pdfium, document, request["page"] - 1) as page:
        return _pixels(pdfium, page, *request["size"])


@dataclass(frozen=True)
class _Document:
    """An open document: pdfium's handle of it, and whether it has fields to fill in."""

    handle: Any
    has_form: bool


@contextmanager
def _opened(pdfium: ModuleType, raw: bytes) -> Iterator[_Document]:
    """The document in `raw`, which must be kept until it is closed. No form is started: nothing in it is ever run."""
    handle = pdfium.FPDF_LoadMemDocument64(raw, len(raw), None)
    if not handle:
        error = pdfium.FPDF_GetLastError()
        if error == pdfium.FPDF_ERR_PASSWORD:
            raise _DocumentError("encrypted: it needs a password")
        if error == pdfium.FPDF_ERR_SECURITY:
            raise _DocumentError("encrypted in a way that pdfium does not know")
        raise _DocumentError("a broken PDF: pdfium finds no document in it")
    try:
        yield _Document(handle, pdfium.FPDF_GetFormType(handle) not in (-1, pdfium.FORMTYPE_NONE))
    finally:
        pdfium.FPDF_CloseDocument(handle)


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
    """How many fields of a page have a value, but no appearance: left for a form's program to draw."""
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


def _pixels(pdfium: ModuleType, page: Any, width: int, height: int) -> bytes:
    """The page as it is shown, with annotations, on white: rows from the top, and blue, green, red of a pixel."""
    pixels = (ctypes.c_ubyte * (3 * width * height))()
    bitmap = pdfium.FPDFBitmap_CreateEx(width, height, pdfium.FPDFBitmap_BGR, pixels, 3 * width)
    if not bitmap:
        raise _PageError("cannot be drawn")
    try:
        pdfium.FPDFBitmap_FillRect(bitmap, 0, 0, width, height, 0xFFFFFFFF)
        pdfium.FPDF_RenderPageBitmap(bitmap, page, 0, 0, width, height, 0, pdfium.FPDF_ANNOT)
    finally:
        pdfium.FPDFBitmap_Destroy(bitmap)
    return bytes(pixels)
