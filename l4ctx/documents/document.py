"""Documents: named texts and images, what was left out beside them, and why nothing could be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from l4ctx.documents.images import DocumentImage
from l4ctx.documents.payload import Payload
from l4ctx.errors import MEMORY, TOO_LONG, InputError
from l4ctx.formatting import printable

Content = str | tuple[str | DocumentImage, ...]


class DocumentError(InputError):
    """Something that the user asked for cannot be read; one line says what, where, and how to mend it."""


class DocumentMemoryError(DocumentError):
    """Not enough memory to read a document."""

    exit_code = MEMORY


class DocumentLengthError(DocumentError):
    """Surely more text than the model has positions for."""

    exit_code = TOO_LONG


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Document:
    """A text, or texts and images in order.

    `source` is unique among the documents of one call, printable, and valid Unicode; `sha256` is the digest of the
    raw bytes. A text has its byte order mark dropped and is otherwise as the file has it, line ends included.
    """

    source: str
    sha256: str
    content: Content
    payload: Payload | None = None  # what was left out of the text
    reading: str = ""  # how it was read, if not as usual: another way is another text
    first_line: int = 1  # of its file, where it has only some lines of that

    @property
    def parts(self) -> tuple[str | DocumentImage, ...]:
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The concatenated text parts."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[DocumentImage]:
        return [part for part in self.parts if isinstance(part, DocumentImage)]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file, or a folder with everything in it, that was left out."""

    source: str
    reason: str
    is_asked: bool = False  # an option says so


@dataclass
class DocumentSet:
    """What was read, what was left out, and notes on what was read (one line each)."""

    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self) -> Iterator[Document]:
        """Hand the documents over one by one, in order, keeping no reference to those already handed over."""
        self.documents.reverse()
        while self.documents:
            yield self.documents.pop()

    @property
    def has_images(self) -> bool:
        return any(document.images for document in self.documents)

    @property
    def characters(self) -> int:
        """Total length of the texts that have not been taken yet."""
        return sum(len(part) for document in self.documents for part in document.parts if isinstance(part, str))

    def require_any(self, paths: Iterable[str]) -> None:
        """Raise DocumentError where nothing was read from `paths`, naming them and the first reasons."""
        if self.documents:
            return
        reasons = [f"{entry.source}: {entry.reason}" for entry in self.skipped]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        found = f"left out {'; '.join(reasons[:3])}{more}" if reasons else "nothing is there"
        left_out = any(word in reason for reason in reasons for word in ("hidden", "ignored"))
        hint = " (name a hidden or ignored file itself to read it)" if left_out else ""
        where = ", ".join(printable(path) for path in paths)
        raise DocumentError(f"found nothing to read in {where}: {found}{hint}")
