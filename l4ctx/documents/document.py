"""Documents: named texts and images, what was left out beside them, and why nothing could be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from l4ctx.documents.images import DocumentImage
from l4ctx.documents.payload import Payload
from l4ctx.errors import MEMORY, InputError
from l4ctx.formatting import printable

Content = str | tuple[str | DocumentImage, ...]


class DocumentError(InputError):
    """What the user asked to read cannot be read: one line that says what, where and how to mend it."""


class DocumentMemoryError(DocumentError):
    """A document that there is not enough memory to read."""

    exit_code = MEMORY


@dataclass(frozen=True)
class Document:
    """One thing to be read: a text, or texts and images in their order.

    `source` is unique among the documents of one call, printable, and valid Unicode; `sha256` is the digest of the
    raw bytes. A text has its byte order mark dropped and is otherwise as the file has it, line ends included.
    """

    source: str
    sha256: str
    content: Content
    payload: Payload | None = None  # what was left out of the text

    @property
    def parts(self) -> tuple[str | DocumentImage, ...]:
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[DocumentImage]:
        return [part for part in self.parts if isinstance(part, DocumentImage)]


@dataclass(frozen=True)
class Skipped:
    """A file, or a folder with all that is in it, that was left out."""

    source: str
    reason: str


@dataclass
class DocumentSet:
    """What was read, what was left out, and what to know about what was read (one line each)."""

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
        """Of the texts that are not taken yet."""
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
