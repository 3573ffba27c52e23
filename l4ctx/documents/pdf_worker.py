"""The process that runs pdfium: text and images of pages, for one request after another on its standard input.

A request or reply is FRAME, a header in JSON and a body; that of a request is to follow the reply that it is "wanted".
pdfium may end the process at any moment: it aborts where memory is short. Every other error ends it too, and its reader
says so (`l4ctx.documents.pdf_process`). Imports no Pillow.

The document that pages are drawn from stays open between requests: one, until another is read or drawn from, or nobody
has asked for _KEPT_SECONDS. Beside its bytes, pdfium holds what it has parsed and copied of it: _MOST_GROWTH and a page
at most, then it is opened anew.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import re
import select
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from types import ModuleType
from typing import Any, BinaryIO

from l4ctx.documents.images import pixels_digest
from l4ctx.machine.files import read_regular_file
from l4ctx.machine.memory import give_back_free_memory, process_memory

try:
    import resource
except ImportError:  # not on every system; there, memory has no limit
    resource = None  # type: ignore[assignment]

FRAME = struct.Struct("!IQ")  # bytes of the header, bytes of the body

_KEPT_SECONDS = 10.0  # reading a document again takes much less, even one of gigabytes
_MOST_GROWTH = 16 << 20  # bytes

_LINE_ENDS = re.compile("\r\n|[\r\v\f]")
# U+FFFE stands for "-" and a line break within a word, and for characters without a meaning; U+00AD is invisible.
_NO_TEXT = re.compile("[\x00\u00ad\ufffe\uffff]")

_Send = Callable[..., None]  # a header, and a body if there is one
_Receive = Callable[[], bytes]  # the body of the request


class _DocumentError(Exception):
    """A document cannot be read; the message is the reason."""


class _PageError(Exception):
    """A page without a text or image: the reason, to follow its number."""


def main() -> None:
    """Serves until standard input ends; then exits at once, even within a page."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):  # a line that a library prints must not come between replies
        os.dup2(nothing, standard)
    _end_with_reader(requests)
    _be_the_first_to_go()
    with open(requests, "rb") as source, open(replies, "wb") as target:

        def send(header: dict[str, Any], body: bytes | bytearray = b"") -> None:
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
        kept = _Kept(pdfium)
        while _serve(kept, source, send):
            kept.wait(source)


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
    """Limits the address space from now on, in bytes. A lower limit set by the user stays."""
    if resource is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (count if most == resource.RLIM_INFINITY else min(count, most), most))


class _Document:
    """A document in memory, open in pdfium. No form is started: nothing in it is ever run."""

    def __init__(self, pdfium: ModuleType, raw: bytes) -> None:
        """Raises _DocumentError."""
        self.raw = raw  # must be kept until it is closed
        self._pdfium = pdfium
        self._open()

    def _open(self) -> None:
        pdfium = self._pdfium
        self.handle = pdfium.FPDF_LoadMemDocument64(self.raw, len(self.raw), None)
        if not self.handle:
            error = pdfium.FPDF_GetLastError()
            if error == pdfium.FPDF_ERR_PASSWORD:
                raise _DocumentError("encrypted: it needs a password")
            if error == pdfium.FPDF_ERR_SECURITY:
                raise _DocumentError("encrypted in a way that pdfium does not know")
            raise _DocumentError("a broken PDF: pdfium finds no document in it")
        self.has_form = pdfium.FPDF_GetFormType(self.handle) not in (-1, pdfium.FORMTYPE_NONE)
        self._held_at_first = _held()

    def close(self) -> None:
        if self.handle:
            self._pdfium.FPDF_CloseDocument(self.handle)
        self.handle = None
        give_back_free_memory()

    def slim(self) -> None:
        """Opens it anew where pdfium has copied much of it: streams of every page seen stay until it is closed."""
        if _held() - self._held_at_first > _MOST_GROWTH:
            self.close()
            self._open()


def _held() -> int:
    """Bytes that this process holds; 0 if unknown."""
    held = process_memory()
    return 0 if held is None else held.anonymous


class _Kept:
    """The document that pages are drawn from, if any, open from one request to the next."""

    def __init__(self, pdfium: ModuleType) -> None:
        self.pdfium = pdfium
        self._document: _Document | None = None
        self._key: object = None  # what tells it from others, and from what it was before

    @property
    def bytes(self) -> int:
        return 0 if self._document is None else len(self._document.raw)

    def document(self, path: str | None, sha256: str | None, receive: _Receive, send: _Send) -> _Document:
        """What is in the file, or the bytes with that digest, to be received where they are not here.

        Says when it has them, and only then opens them, which may take long. Raises _DocumentError.
        """
        try:
            now = None if path is None else os.stat(path)
            key = sha256 if now is None else (path, now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
            if self._document is not None and key == self._key:
                send({"received": True})
                return self._document
            self.close()
            raw = receive() if path is None else read_regular_file(path)[0]
            send({"received": True})
            self._document, self._key = _Document(self.pdfium, raw), key
        except OSError as error:
            raise _DocumentError(f"cannot be read any more: {error.strerror}") from None
        except _DocumentError as error:
            raise _DocumentError(_changed(error)) from None
        return self._document

    def close(self) -> None:
        document, self._document = self._document, None
        if document is not None:
            document.close()
            del document
            give_back_free_memory()

    def wait(self, source: BinaryIO) -> None:
        """For the next request; where that takes long, the document is closed."""
        if self._document is None or not hasattr(select, "poll"):
            return
        coming = select.poll()
        coming.register(source, select.POLLIN)
        if not coming.poll(1000 * _KEPT_SECONDS):
            self.close()


def _changed(error: Exception) -> str:
    """For a document or page that could be drawn at first."""
    return f"changed since it was first read ({error})"


def _serve(kept: _Kept, source: BinaryIO, send: _Send) -> bool:
    """One request; its last reply says so, and how many bytes of a document are kept. False where there is none."""
    frame = source.read(FRAME.size)
    if len(frame) < FRAME.size:
        return False
    header_bytes, body_bytes = FRAME.unpack(frame)
    request = json.loads(source.read(header_bytes))
    _limit_memory(request["memory"])

    def receive() -> bytes:
        send({"wanted": True})
        return source.read(body_bytes)

    last: dict[str, Any] = {}
    pixels = bytearray()
    try:
        if request["do"] == "read":
            kept.close()
            _read(kept.pdfium, receive(), request, send)
            give_back_free_memory()
        else:
            last["size"], pixels = _drawn(kept, request, receive, send)
    except (_DocumentError, _PageError) as error:
        last = {"error": str(error)}
    send(last | {"last": True, "kept": kept.bytes}, pixels)
    return True


def _read(pdfium: ModuleType, raw: bytes, request: dict[str, Any], send: _Send) -> None:
    """The number of pages, and then a reply for every one from `first` (counted from 1) on, its text as the body."""
    send({"received": True})
    with closing(_Document(pdfium, raw)) as document:
        pages = pdfium.FPDF_GetPageCount(document.handle)
        if pages < 1:
            raise _DocumentError("a PDF without pages")
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


def _drawn(kept: _Kept, request: dict[str, Any], receive: _Receive, send: _Send) -> tuple[tuple[int, int], bytearray]:
    """The size and the pixels of a page that could be drawn before."""
    pdfium, index = kept.pdfium, request["page"] - 1
    document = kept.document(request["path"], request["sha256"], receive, send)
    try:
        with _loaded(pdfium, document, index) as page:
            size = _image_size(pdfium, document, index, request["longer_side"])
            pixels = _pixels(pdfium, page, *size)
    except _PageError as error:
        raise _DocumentError(_changed(error)) from None
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


if __name__ == "__main__":
    main()
