"""The content of one file: its kind, whether it is read at all, and its text and images."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from l4ctx.documents.document import Content, DocumentLengthError, DocumentMemoryError
from l4ctx.documents.images import ImageError, image_format, read_image
from l4ctx.documents.length import TextLimit, chunks_of
from l4ctx.documents.lines import LineRange, LinesError, numbered
from l4ctx.documents.notebook import notebook
from l4ctx.documents.office import convert, formats
from l4ctx.documents.office.convert import OfficeError
from l4ctx.documents.payload import Payload, without_payload
from l4ctx.documents.pdf import PdfError, check_support, is_pdf, read_pdf
from l4ctx.documents.recognition import Kind, binary_kind, is_rtf
from l4ctx.documents.text import UndecodableError, check_encoding, decode, is_text
from l4ctx.formatting import human_bytes, printable
from l4ctx.machine.files import SAMPLE_BYTES
from l4ctx.machine.memory import available_memory

_LFS, _LFS_BYTES = b"version https://git-lfs.github.com/spec/v1\n", 1024
_SURELY_FREE = 2**24  # bytes; less needs no look at the free memory


class LeftOutError(Exception):
    """A file is left out; the message is the reason."""


class FileSizeError(LeftOutError):
    """A file is larger than what is to be read of one."""


NOT_READ = (LeftOutError, ImageError, OfficeError, PdfError, UndecodableError)
"""Raised for files that are left out, with the reason as message; the reading goes on."""


class ReadContent(NamedTuple):
    """What was read of a file, what was left out of its text, notes, and how it was read, if not as usual."""

    content: Content
    payload: Payload | None
    notes: list[str]
    reading: str = ""


@dataclass(frozen=True)
class ContentReader:
    """How files are read; the arguments are those of `l4ctx.documents.reader.read_documents`."""

    pdf: str = "text"
    no_images: str | None = None
    encoding: str | None = None
    keep_payload: bool = False
    limit: TextLimit | None = None
    max_size: int | None = None  # bytes
    line_numbers: bool = False
    html: str = "source"

    def check(self, path: str | None, sample: bytes, size: int | None, *, is_part: bool = False) -> None:
        """Raises one of NOT_READ for a file that is left out, judged by its first bytes; DocumentMemoryError, and
        DocumentLengthError for text that is surely too long.

        `size` is in bytes; None if unknown, as for a pipe. `is_part`: only some of its lines are wanted.
        """
        is_plain = False
        self._check_size(size or 0)
        if len(sample) < _LFS_BYTES and sample.startswith(_LFS):
            raise LeftOutError("a Git LFS pointer, not the file itself (git lfs pull fetches it)")
        if is_pdf(sample):
            check_support()
        elif (format := self.office_format(sample)) is not None:
            if format != "eml":
                convert.check_support(format)
        elif not is_text(sample, self.encoding):
            image_kind = image_format(sample)
            if image_kind is None:
                raise LeftOutError(_named(binary_kind(sample), path))
            if self.no_images is not None:
                raise LeftOutError(f"a {image_kind} image; {self.no_images}")
        else:
            is_plain = True
        if is_plain and size is not None and path is not None and not is_part:
            self.check_length(size, partial(chunks_of, path))
        if size is not None and size > _SURELY_FREE and size > (free := _free_memory(size)):
            raise DocumentMemoryError(
                f"{human_bytes(size)}, but {human_bytes(free)} of memory is free; split it, or leave it out"
            )

    def check_length(self, size: int, chunks: Callable[[], Iterable[bytes]]) -> None:
        """Raises DocumentLengthError for text that is surely too long."""
        if self.limit is not None and self.encoding is None:
            self.limit.check(size, chunks, keep_payload=self.keep_payload)

    def _check_size(self, size: int) -> None:
        if self.max_size is not None and size > self.max_size:
            raise FileSizeError(f"{human_bytes(size)}, more than --max-file-size {human_bytes(self.max_size)}")

    def check_growth(self, raw: bytes) -> None:
        """Raises FileSizeError, DocumentLengthError and DocumentMemoryError for what a pipe has carried so far."""
        self._check_size(len(raw))
        if self.is_text(raw) and not is_pdf(raw) and self.office_format(raw[:SAMPLE_BYTES]) is None:
            self.check_length(len(raw), lambda: iter([raw]))
        if len(raw) > (free := _free_memory(len(raw))):
            raise DocumentMemoryError(
                f"{human_bytes(len(raw))} so far, but {human_bytes(free)} of memory is free; split it, or leave it out"
            )

    def read(self, source: str, raw: bytes, path: str | None, lines: LineRange | None = None) -> ReadContent:
        """Raises one of NOT_READ, and LinesError where it does not have these `lines`."""
        self._check_size(len(raw))
        is_pages = is_pdf(raw)
        format = None if is_pages else self.office_format(raw[:SAMPLE_BYTES])
        if format is not None or is_pages or not self.is_text(raw):
            if lines is not None:
                raise LinesError(f"{source}: only text has lines; name the file without :{lines}")
            if is_pages:
                parts, notes = read_pdf(source, raw, path, mode=self.pdf)
                return ReadContent(tuple(parts), None, notes)
            if format is not None:
                text, notes = convert.read_office(format, self._in_utf8(raw) if format == "html" else raw)
                return ReadContent(self._taken(text), None, notes)
            image, notes = read_image(source, raw, path)
            return ReadContent((image,), None, notes)
        text, notes = decode(raw, self.encoding)
        if not text or text.isspace():
            raise LeftOutError("empty" if not raw else "nothing but white space")
        in_lines = (lines is not None or self.line_numbers) and (self.keep_payload or notebook(text) is None)
        if lines is not None and not in_lines:
            raise LinesError(f"{source}: a notebook is read by its cells; --keep-payload reads the file's lines")
        if lines is not None:
            text = lines.of(text, source)
        text, payload = (text, None) if self.keep_payload else without_payload(text, keep_lines=in_lines)
        if not text:
            raise LeftOutError("a notebook without cells")
        reading = ""
        if in_lines and self.line_numbers:
            text, reading = numbered(text, lines.first if lines is not None else 1), "numbered"
        return ReadContent(self._taken(text), payload, notes, reading)

    def _taken(self, text: str) -> str:
        if self.limit is not None:
            self.limit.taken += len(text)
        return text

    def _in_utf8(self, page: bytes) -> bytes:
        """An HTML page in the encoding that pandoc expects. Raises UndecodableError."""
        given = self.encoding
        if given is None and (declared := formats.html_encoding(page)) is not None:
            with suppress(ValueError):
                given = check_encoding(declared)
        return decode(page, given)[0].encode("utf-8", "replace")

    def office_format(self, sample: bytes) -> str | None:
        """What `l4ctx.documents.office` reads what begins with `sample` as; None: it is no office document, or read as
        the text that it is."""
        if sample.startswith(b"PK"):
            kind = None if is_text(sample, self.encoding) else binary_kind(sample)
            return None if kind is None else kind.office or None
        if is_rtf(sample):
            return "rtf"
        if not self.keep_payload and formats.is_email(sample):
            return "eml"
        return "html" if self.html == "text" and formats.is_html(sample) else None

    def is_text(self, raw: bytes) -> bool:
        return is_text(raw[:SAMPLE_BYTES], self.encoding)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Adds the name of the document to errors about memory and length."""
    try:
        yield
    except (DocumentMemoryError, DocumentLengthError) as error:
        raise type(error)(f"{name}: {error}") from None
    except MemoryError:
        raise DocumentMemoryError(f"{name}: there is not enough memory to read it; split it, or leave it out") from None


def _free_memory(unknown: int) -> int:
    """In bytes; `unknown` if the system does not report it."""
    free = available_memory()
    return unknown if free is None else free


def _named(found: Kind | None, path: str | None) -> str:
    """The kind of a file that is left out, and what to do about it."""
    if found is None:
        return "binary"
    file = "FILE" if path is None else shlex.quote(printable(path))
    return found.name + (f"; {found.remedy.replace('{file}', file)}" if found.remedy else "")
