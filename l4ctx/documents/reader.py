"""Files, folders and standard input become documents: named text and images, in an order that never changes.

Everything that is left out is reported with its reason. Printing, wrapping for the prompt and tokenizing are left to
others (`l4ctx.cli.app`, `l4ctx.prompt.builder`, `l4ctx.checkpoint.tokenizer`), as are the formats
(`l4ctx.documents.recognition`, `l4ctx.documents.text`, `l4ctx.documents.payload`, `l4ctx.documents.images`,
`l4ctx.documents.pdf`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from l4ctx.contexts.folder import is_context
from l4ctx.documents.exclusion.rules import Exclusion, Rules
from l4ctx.documents.images import DocumentImage, ImageError, image_format, read_image
from l4ctx.documents.payload import Payload, without_payload
from l4ctx.documents.pdf import PdfError, check_support, is_pdf, read_pdf
from l4ctx.documents.recognition import RTF, Kind, binary_kind, is_rtf
from l4ctx.documents.text import UndecodableError, decode, is_text
from l4ctx.errors import MEMORY, InputError
from l4ctx.formatting import human_bytes, printable
from l4ctx.machine.files import SAMPLE_BYTES, kind, read_regular_file
from l4ctx.machine.memory import available_memory

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


class _LeftOutError(Exception):
    """A document that is not read, with the reason."""


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


def read_documents(
    paths: Iterable[str | os.PathLike[str]],
    *,
    stdin: BinaryIO | None,
    pdf: str = "text",
    no_images: str | None = None,
    encoding: str | None = None,
    keep_payload: bool = False,
    skip_unreadable: bool = False,
    progress: Callable[[int], None] | None = None,
) -> DocumentSet:
    """Read every file, folder and `-` (standard input) of `paths`, in the order given.

    Folders are walked in the order of their paths' bytes. What git ignores, hidden and binary files and links that lead
    out of the folder are left out and listed in `skipped`; with `skip_unreadable`, so is what cannot be read. A file
    named itself is read even if hidden or ignored. A file reached twice is read once. `pdf` is one of
    l4ctx.documents.pdf.PDF_MODES; `no_images` says why image files are left out, if they are; `encoding` names that of
    all text that is not UTF-8 and has no byte order mark, None: it is detected; `keep_payload` keeps what
    `l4ctx.documents.payload` would leave out; `progress` is told the number of documents after each. What a file is,
    its first 64 KiB tell; of what is left out no more is read. Raises DocumentError for a path that is missing, is not
    a file or folder, or cannot be read, for what cannot be read in a folder unless `skip_unreadable`, and for `-` given
    twice or without `stdin`; DocumentMemoryError for a file that does not fit into memory.
    """
    reader = _Reader(stdin, pdf, no_images, encoding, keep_payload, progress, skip_unreadable)
    for path in paths:
        reader.read_argument(os.fsdecode(path))
    reader.require_all()
    return reader.found


def _file_source(path: str) -> str:
    """The name of a file argument: as typed, normalised, without what leads out of or to the top of the tree."""
    parts = os.path.normpath(path).replace(os.sep, "/").split("/")
    return printable("/".join(part for part in parts if part not in ("", "..")))


def folder_source(path: str) -> str:
    """The name of a folder argument: its last component; of the current folder, none."""
    name = os.path.basename(os.path.normpath(path))
    return printable({os.curdir: "", os.pardir: os.path.basename(os.path.abspath(path))}.get(name, name))


@dataclass(frozen=True)
class _Entry:
    """Something met in a folder, still to be looked at."""

    path: str  # as it was reached, by links perhaps
    own: str  # without links on the way to it
    real: str  # where it leads: `own`, if it is no link
    source: str
    rules: Rules | None  # of the folder that it is in
    status: os.stat_result | OSError  # of what a link leads to
    is_link: bool

    @property
    def is_folder(self) -> bool:
        return not isinstance(self.status, OSError) and stat.S_ISDIR(self.status.st_mode)


class _Reader:
    """The state of one `read_documents` call."""

    def __init__(
        self,
        stdin: BinaryIO | None,
        pdf: str,
        no_images: str | None,
        encoding: str | None,
        keep_payload: bool,
        progress: Callable[[int], None] | None,
        skip_unreadable: bool,
    ) -> None:
        self.found = DocumentSet()
        self._encoding, self._keep_payload = encoding, keep_payload
        self._pdf, self._no_images, self._progress = pdf, no_images, progress
        self._stdin = stdin
        self._stdin_read = False
        self._sources: set[str] = set()
        self._exclusion = Exclusion()
        self._skip_unreadable, self._missed = skip_unreadable, list[str]()
        self._seen: dict[str, str] = {}  # real path of a file or folder -> the source it was read as

    def read_argument(self, path: str) -> None:
        if path == "-":
            return self._read_stdin()
        if not path:
            raise DocumentError("a path is empty (is a shell variable unset?)")
        try:
            mode = os.stat(path).st_mode
            real = os.path.realpath(path)
        except FileNotFoundError:
            raise DocumentError(f"{printable(path)}: no such file or folder (check the spelling)") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in it
            reason = getattr(error, "strerror", None) or error
            raise DocumentError(f"{printable(path)}: cannot be read: {reason}") from None
        if stat.S_ISDIR(mode):
            return self._walk(path, real)
        if stat.S_ISREG(mode):
            return self._read_named_file(path, real)
        if stat.S_ISFIFO(mode):
            return self._read_pipe(path)
        raise DocumentError(f"{printable(path)}: is a {kind(mode)}, not a file (pipe its content in and use -)")

    def _read_stdin(self) -> None:
        if self._stdin is None:
            raise DocumentError("- stands for standard input, but there is none to read")
        if self._stdin_read:
            raise DocumentError("- (standard input) is given twice; it can be read only once")
        self._stdin_read = True
        try:
            self._read_stream("stdin", self._stdin)
        except OSError as error:
            raise DocumentError(f"standard input cannot be read: {error.strerror}") from None

    def _read_pipe(self, path: str) -> None:
        """A pipe named by the user, such as the shell's <(command): waits for what is written into it."""
        try:
            with open(path, "rb") as pipe:
                self._read_stream(_file_source(path), pipe)
        except OSError as error:
            raise DocumentError(f"{printable(path)}: cannot be read: {error.strerror}") from None

    def _read_stream(self, source: str, stream: BinaryIO) -> None:
        """What comes through a pipe; of what is not wanted, the beginning alone."""
        with _naming(source):
            sample = stream.read(SAMPLE_BYTES)
            try:
                self._check(None, sample, None)
            except _NOT_READ as error:
                self._skip(source, str(error))
            else:
                self._add(source, sample + stream.read())

    def _read_named_file(self, path: str, real: str) -> None:
        source = _file_source(path)
        if self._already_read(real, source):
            return
        try:
            with _naming(printable(path)):
                raw, changed = read_regular_file(path, partial(self._check, path))
                if changed and not _is_text(raw, self._encoding):
                    self._skip(source, "changed while it was read")
                    return
                if changed:
                    self.found.notes.append(f"{source}: changed while it was read")
                self._seen[real] = self._add(source, raw, path)
        except _NOT_READ as error:
            self._skip(source, str(error))
        except OSError as error:
            raise DocumentError(f"{printable(path)}: cannot be read: {error.strerror}") from None

    def _walk(self, path: str, root: str) -> None:
        source = folder_source(path)
        if is_context(root):
            raise DocumentError(f"{printable(path)}: a saved context, not documents (--context answers from it)")
        if self._already_read(root, source or "."):
            return
        self._seen[root] = source or "."
        try:
            rules = self._exclusion.top(root)
            pending = self._list(root, root, source, rules)
        except OSError as error:
            raise DocumentError(f"{printable(path)}: the folder cannot be read: {error.strerror}") from None
        while pending:
            entry = pending.pop()
            try:
                pending += self._visit(entry, root, rules)
            except FileNotFoundError:
                self._miss(entry.source, "vanished while the folder was read")
            except OSError as error:
                self._miss(entry.source, f"cannot be read: {error.strerror}")
        for file, problem, is_missed in self._exclusion.take_problems():
            is_within = file.startswith(os.path.join(root, ""))
            name = printable(os.path.join(source, os.path.relpath(file, root)) if is_within else file)
            if is_missed:
                self._miss(name, problem)
            else:
                self.found.notes.append(f"{name}: {problem}")

    def _list(self, path: str, real: str, source: str, rules: Rules | None) -> list[_Entry]:
        """The entries of a folder, last one first: to be popped in the order of their paths' bytes."""
        with os.scandir(path) as scan:
            found = list(scan)
        entries = []
        for each in found:
            is_link = each.is_symlink()
            status: os.stat_result | OSError
            try:
                status = os.stat(each.path)
            except OSError as error:
                status = error
            own = os.path.join(real, each.name)
            entry = _Entry(
                each.path,
                own,
                os.path.realpath(own) if is_link else own,
                f"{source}/{printable(each.name)}".lstrip("/"),
                rules,
                status,
                is_link,
            )
            entries.append((os.fsencode(each.name) + b"/" * entry.is_folder, entry))
        return [entry for _, entry in sorted(entries, key=lambda pair: pair[0], reverse=True)]

    def _visit(self, entry: _Entry, root: str, top: Rules | None) -> list[_Entry]:
        """Read one entry of a folder, or say why not; the entries of a sub-folder are returned. Raises OSError."""
        if reason := _reason_to_leave_out(entry, root):
            self._skip(entry.source, reason)
            return []
        if isinstance(entry.status, OSError):
            raise entry.status
        rules = entry.rules
        if entry.is_link:
            rules, ignored = self._exclusion.of_link(entry.real, root, top, is_folder=entry.is_folder)
            if ignored:
                self._skip(entry.source, "a symbolic link to something ignored")
                return []
        if self._already_read(entry.real, entry.source):
            return []
        if entry.is_folder:
            self._seen[entry.real] = entry.source
            return self._list(entry.path, entry.real, entry.source, self._exclusion.inside(entry.real, rules))
        if not stat.S_ISREG(entry.status.st_mode):
            self._skip(entry.source, f"a {kind(entry.status.st_mode)}, not a file")
            return []
        try:
            with _naming(entry.source):
                raw, changed = read_regular_file(entry.path, partial(self._check, entry.path))
                if changed:
                    self._miss(entry.source, "changed while it was read")
                else:
                    self._seen[entry.real] = self._add(entry.source, raw, entry.path)
        except _NOT_READ as error:
            self._skip(entry.source, str(error))
        except DocumentMemoryError as error:
            if not self._skip_unreadable:
                raise
            self._skip(entry.source, str(error).removeprefix(f"{entry.source}: "))
        return []

    def _miss(self, source: str, reason: str) -> None:
        """An entry of a folder that should have been read."""
        if self._skip_unreadable:
            self._skip(source, reason)
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

    def _already_read(self, real: str, source: str) -> bool:
        if real in self._seen:
            self._skip(source, f"the same as {self._seen[real]}")
        return real in self._seen

    def _add(self, source: str, raw: bytes, path: str | None = None) -> str:
        """Keep `raw` as a document if it can be read; return the source under which it is known."""
        unique, count = source, 1
        while unique in self._sources:
            count += 1
            unique = f"{source} ({count})"
        try:
            content, payload, notes = self._content(unique, raw, path)
        except _NOT_READ as error:
            self._skip(source, str(error))
            return source
        self._sources.add(unique)
        self.found.notes += [f"{unique}: {note}" for note in notes]
        self.found.documents.append(Document(unique, hashlib.sha256(raw).hexdigest(), content, payload))
        if self._progress is not None:
            self._progress(len(self.found.documents))
        return unique

    def _check(self, path: str | None, sample: bytes, size: int | None) -> None:
        """Raises _NOT_READ for a file that is not wanted, by its first bytes, and DocumentMemoryError.

        `size` in bytes; None where nobody knows it, as of a pipe.
        """
        if is_pdf(sample):
            check_support()
        elif not is_text(sample, self._encoding):
            image_kind = image_format(sample)
            if image_kind is None:
                raise _LeftOutError(_named(binary_kind(sample), path))
            if self._no_images is not None:
                raise _LeftOutError(f"a {image_kind} image; {self._no_images}")
        elif is_rtf(sample):
            raise _LeftOutError(_named(RTF, path))
        if size is not None and size > _SURELY_FREE and size > (free := _free_memory(size)):
            raise DocumentMemoryError(
                f"{human_bytes(size)}, but {human_bytes(free)} of memory are free; split it, or leave it out"
            )

    def _content(self, source: str, raw: bytes, path: str | None) -> tuple[Content, Payload | None, list[str]]:
        """What a document shows, what was left out of its text, and notes. Raises _NOT_READ."""
        if is_pdf(raw):
            parts, notes = read_pdf(source, raw, path, mode=self._pdf)
            return tuple(parts), None, notes
        if not _is_text(raw, self._encoding):
            image, notes = read_image(source, raw, path)
            return (image,), None, notes
        text, notes = decode(raw, self._encoding)
        if not text or text.isspace():
            raise _LeftOutError("empty" if not raw else "nothing but white space")
        text, payload = (text, None) if self._keep_payload else without_payload(text)
        if not text:
            raise _LeftOutError("a notebook without cells")
        return text, payload, notes

    def _skip(self, source: str, reason: str) -> None:
        self.found.skipped.append(Skipped(source, reason))


_NOT_READ = (_LeftOutError, ImageError, PdfError, UndecodableError)
_SURELY_FREE = 2**24  # bytes; for less nobody is asked what is free


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says of which document the memory is not enough."""
    try:
        yield
    except DocumentMemoryError as error:
        raise DocumentMemoryError(f"{name}: {error}") from None
    except MemoryError:
        raise DocumentMemoryError(f"{name}: there is not enough memory to read it; split it, or leave it out") from None


def _free_memory(unknown: int) -> int:
    """Bytes; `unknown` where the system does not tell."""
    free = available_memory()
    return unknown if free is None else free


def _is_text(raw: bytes, encoding: str | None = None) -> bool:
    return is_text(raw[:SAMPLE_BYTES], encoding)


def _named(found: Kind | None, path: str | None) -> str:
    """What a file is that is left out, and what to do."""
    if found is None:
        return "binary"
    file = "FILE" if path is None else shlex.quote(printable(path))
    return found.name + (f"; {found.remedy.replace('{file}', file)}" if found.remedy else "")


def _reason_to_leave_out(entry: _Entry, root: str) -> str | None:
    """Why an entry of the folder `root` is not even opened, if so."""
    if os.path.basename(entry.path).startswith("."):
        return "hidden"
    if entry.is_folder and is_context(entry.path):
        return "a saved context"
    if entry.rules and (reason := entry.rules.reason(entry.own, is_folder=entry.is_folder and not entry.is_link)):
        return reason
    if not entry.is_link:
        return None
    if isinstance(entry.status, OSError) and entry.status.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return "a symbolic link that leads nowhere"
    if entry.is_folder and (os.path.dirname(entry.own) + os.sep).startswith(os.path.join(entry.real, "")):
        return "a symbolic link to a folder that it lies in (a loop)"
    if not entry.real.startswith(os.path.join(root, "")):
        return "a symbolic link that leaves the folder"
    if any(part.startswith(".") for part in os.path.relpath(entry.real, root).split(os.sep)):
        return "a symbolic link to something hidden"
    return None
