"""Documents as they are gathered: each file once, under a name of its own, and what is left out with its reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from l4ctx.documents.content import NOT_READ, ContentReader, FileSizeError
from l4ctx.documents.document import Document, DocumentError, DocumentSet, Skipped
from l4ctx.documents.lines import LineRange
from l4ctx.documents.reached import Reached
from l4ctx.documents.selection import Patterns, Selection
from l4ctx.formatting import printable


def file_source(path: str) -> str:
    """The name of a file argument: as typed, normalised, without what leads out of or to the top of the tree."""
    parts = os.path.normpath(path).replace(os.sep, "/").split("/")
    return printable("/".join(part for part in parts if part not in ("", "..", ".")))


class Collector:
    """The state of one `read_documents` call, wherever files come from."""

    def __init__(
        self,
        content: ContentReader,
        selection: Selection,
        progress: Callable[[int], None] | None,
        *,
        skip_unreadable: bool,
    ) -> None:
        self.found = DocumentSet()
        self.content = content
        self.reached = Reached()
        self.skip_unreadable = skip_unreadable
        self._progress = progress
        self._missed = list[str]()
        self._sources: set[str] = set()
        self.has_patterns = bool(selection.include or selection.exclude)
        self._patterns = Patterns(selection)
        self._contents: dict[str, str] | None = None if selection.keep_duplicates else {}  # digest -> source

    def is_unwanted(self, within: str, typed: str, source: str, *, is_folder: bool = False) -> bool:
        """Whether a pattern leaves it out, which is noted."""
        reason = self._patterns.reason(within, typed, is_folder=is_folder)
        if reason is not None:
            self.found.skipped.append(Skipped(source, reason, is_asked=True))
        return reason is not None

    def miss(self, source: str, reason: str) -> None:
        """An entry of a folder that should have been read."""
        if self.skip_unreadable:
            self.skip(source, reason)
        else:
            self._missed.append(f"{source if len(source) <= 200 else f'...{source[-200:]}'}: {reason}")

    def require_all(self) -> None:
        """Raise DocumentError where something in a folder could not be read: the first three, and how many more."""
        if self._missed:
            more = f"; and {len(self._missed) - 3} more" if len(self._missed) > 3 else ""
            raise DocumentError(
                f"{'; '.join(self._missed[:3])}{more} (--skip-unreadable leaves "
                f"{'it' if len(self._missed) == 1 else 'them'} out)"
            )

    def already_read(self, real: str, source: str, *, walked: bool = False) -> bool:
        """`walked`: it was reached by no link, and is not named by the user."""
        known = self.reached.source(real, self.found.documents, walked=walked)
        if known is not None:
            self.skip(source, f"the same as {known}")
        return known is not None

    def add(
        self,
        source: str,
        raw: bytes,
        path: str | None = None,
        real: str | None = None,
        *,
        walked: bool = False,
        is_named: bool = True,
        lines: LineRange | None = None,
    ) -> None:
        """Keep `raw` as a document if it can be read, and if it is named or no copy of another one."""
        digest = hashlib.sha256(raw).hexdigest()
        if not is_named and (known := self._contents and self._contents.get(digest)):
            self.skip(source, f"the same content as {known}")
            return
        unique, count = source, 1
        while unique in self._sources:
            count += 1
            unique = f"{source} ({count})"
        try:
            read = self.content.read(unique, raw, path, lines)
        except FileSizeError:  # of a pipe
            raise
        except NOT_READ as error:
            self.skip(source, str(error))
            return
        if lines is not None:
            digest = hashlib.sha256(str(read.content).encode("utf-8", "surrogatepass")).hexdigest()
        self._sources.add(unique)
        self.reached.add(real, unique, walked=walked)
        self.found.notes += [f"{unique}: {note}" for note in read.notes]
        first = lines.first if lines is not None else 1
        self.found.documents.append(Document(unique, digest, read.content, read.payload, read.reading, first))
        if self._contents is not None:
            self._contents.setdefault(digest, unique)
        if self._progress is not None:
            self._progress(len(self.found.documents))

    def skip(self, source: str, reason: str) -> None:
        self.found.skipped.append(Skipped(source, reason))
