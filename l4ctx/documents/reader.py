"""Reads files, folders and standard input as documents, in a deterministic order.

Everything that is left out is reported with its reason.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from typing import BinaryIO, Protocol

from l4ctx.contexts.folder import is_context
from l4ctx.documents.collecting import Collector, file_source
from l4ctx.documents.commits import CommitReader, DiffReader
from l4ctx.documents.content import NOT_READ, ContentReader, FileSizeError, naming
from l4ctx.documents.document import DocumentError, DocumentMemoryError, DocumentSet
from l4ctx.documents.exclusion.rules import Exclusion, Rules
from l4ctx.documents.folder import Entry, Level, folder_source, reason_to_leave_out
from l4ctx.documents.length import TextLimit
from l4ctx.documents.lines import LineRange, split_range
from l4ctx.documents.selection import Selection
from l4ctx.errors import SHORTAGES
from l4ctx.formatting import printable
from l4ctx.machine.files import SAMPLE_BYTES, read_regular_file
from model.folder import kind

_CHUNK_BYTES = 1 << 20
_ALL = Selection()


def read_documents(
    paths: Iterable[str | os.PathLike[str]],
    *,
    stdin: BinaryIO | None,
    pdf: str = "text",
    no_images: str | None = None,
    encoding: str | None = None,
    keep_payload: bool = False,
    skip_unreadable: bool = False,
    limit: TextLimit | None = None,
    progress: Callable[[int], None] | None = None,
    selection: Selection = _ALL,
    html: str = "source",
) -> DocumentSet:
    """Read every file, folder and `-` (standard input) of `paths`, in the order given.

    A path may end with a range of lines, as in `notes.md:10-40`, unless a file has that name.

    Folders are walked in the order of their paths' bytes. What git ignores, hidden and binary files and links that lead
    out of the folder are left out and listed in `skipped`; with `skip_unreadable`, so is what cannot be read. A file
    named itself is read even if hidden or ignored. A file reached twice is read once, and so is what files of folders
    hold alike, unless `selection` keeps duplicates; it also says which files are read, and up to which size. `pdf` is
    one of l4ctx.documents.pdf.PDF_MODES; `no_images` says why image files are left out, if they are; `encoding` names
    that of all text that is not UTF-8 and has no byte order mark, None: it is detected; `keep_payload` keeps what
    `l4ctx.documents.payload` would leave out; `html` is "source", or "text" for that of web pages; `progress` is told
    the number of documents after each. What a file is, its first 64 KiB tell; of what is left out no more is read.
    Raises DocumentError for a path that is missing, is not a file or folder, or cannot be read, for what cannot be read
    in a folder unless `skip_unreadable`, and for `-` given twice or without `stdin`; DocumentMemoryError for a file
    that does not fit into memory; DocumentLengthError for text that surely has more tokens than `limit` says.
    """
    content = ContentReader(
        pdf, no_images, encoding, keep_payload, limit, selection.max_file_size, selection.line_numbers, html
    )
    collector = Collector(content, selection, progress, skip_unreadable=skip_unreadable)
    with closing(_reader(collector, selection, stdin)) as reader:
        for path in paths:
            reader.read_argument(os.fsdecode(path))
    collector.require_all()
    return collector.found


class _Reader(Protocol):
    def read_argument(self, path: str) -> None: ...

    def close(self) -> None: ...


def _reader(collector: Collector, selection: Selection, stdin: BinaryIO | None) -> _Reader:
    """What reads paths: of this machine, or of commits."""
    if selection.git_ref is not None:
        return CommitReader(collector, selection.git_ref)
    return PathReader(collector, stdin) if selection.diff is None else DiffReader(collector, selection.diff)


def _real_path(path: str) -> str:
    """Without links. Raises OSError where one of them cannot be read."""
    try:
        return os.path.realpath(path, strict=True)
    except FileNotFoundError:  # a descriptor's file may have no name any more, as /dev/stdin of a here-document
        return os.path.realpath(path)


class PathReader:
    """Reads files and folders of this machine, and pipes."""

    def __init__(self, collector: Collector, stdin: BinaryIO | None) -> None:
        self._collector = collector
        self._stdin = stdin
        self._stdin_read = False
        self._exclusion = Exclusion()

    def close(self) -> None:
        """Nothing is held open."""

    def read_argument(self, path: str) -> None:
        if path == "-":
            return self._read_stdin()
        if not path:
            raise DocumentError("a path is empty (is a shell variable unset?)")
        path, lines = split_range(path)
        try:
            mode = os.stat(path).st_mode
            real = _real_path(path)
        except FileNotFoundError:
            raise DocumentError(f"{printable(path)}: no such file or folder (check the spelling)") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in it
            reason = getattr(error, "strerror", None) or error
            raise DocumentError(f"{printable(path)}: cannot be read: {reason}") from None
        if lines is not None:
            lines.check(printable(path))
        if stat.S_ISREG(mode):
            return self._read_named_file(path, real, lines)
        if lines is not None:
            raise DocumentError(f"{printable(path)}:{lines}: {printable(path)} is no file, and has no lines")
        if stat.S_ISDIR(mode):
            return self._walk(path, real)
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
        except FileSizeError as error:
            raise DocumentError(f"standard input: {error}") from None
        except OSError as error:
            raise DocumentError(f"standard input cannot be read: {error.strerror}") from None

    def _read_pipe(self, path: str) -> None:
        """A pipe named by the user, such as the shell's <(command): waits for what is written into it."""
        try:
            with open(path, "rb") as pipe:
                self._read_stream(file_source(path), pipe)
        except FileSizeError as error:
            raise DocumentError(f"{printable(path)}: {error}") from None
        except OSError as error:
            raise DocumentError(f"{printable(path)}: cannot be read: {error.strerror}") from None

    def _read_stream(self, source: str, stream: BinaryIO) -> None:
        """Reads a pipe; only the beginning, if what it carries is left out."""
        with naming(source):
            sample = stream.read(SAMPLE_BYTES)
            try:
                self._collector.content.check(None, sample, None)
            except NOT_READ as error:
                self._collector.skip(source, str(error))
            else:
                self._collector.add(source, self._whole(sample, stream))

    def _whole(self, sample: bytes, stream: BinaryIO) -> bytes:
        """All that a pipe carries, which nothing but its end bounds: checked as it grows."""
        whole = io.BytesIO()
        size, checked = whole.write(sample), 1 << 24
        while chunk := stream.read(_CHUNK_BYTES):
            size += whole.write(chunk)
            if size > checked:
                checked = size + size // 4
                self._collector.content.check_growth(whole.getvalue())
        return whole.getvalue()

    def _read_named_file(self, path: str, real: str, lines: LineRange | None) -> None:
        name = source = file_source(path)
        if lines is not None:
            source, real = f"{source}:{lines}", f"{real}\0{lines}"  # no file has a NUL character in its name
        if self._collector.already_read(real, source) or self._collector.is_unwanted(name, name, source):
            return
        try:
            with naming(printable(path)):
                raw, changed = read_regular_file(
                    path, partial(self._collector.content.check, path, is_part=lines is not None)
                )
                if changed and not self._collector.content.is_text(raw):
                    self._collector.skip(source, "changed while it was read")
                    return
                if changed:
                    self._collector.found.notes.append(f"{source}: changed while it was read")
                self._collector.add(source, raw, path, real, lines=lines)
        except FileSizeError as error:
            raise DocumentError(f"{printable(path)}: {error}") from None
        except NOT_READ as error:
            self._collector.skip(source, str(error))
        except OSError as error:
            raise DocumentError(f"{printable(path)}: cannot be read: {error.strerror}") from None

    def _walk(self, path: str, root: str) -> None:
        source, typed = folder_source(path), file_source(path)
        if is_context(root):
            raise DocumentError(f"{printable(path)}: a saved context, not documents (--context answers from it)")
        if self._collector.already_read(root, source or "."):
            return
        self._collector.reached.note(root, source or ".")
        try:
            top = Level(root, root, source)
            top.rules = self._exclusion.top(root)
        except OSError as error:
            raise DocumentError(f"{printable(path)}: the folder cannot be read: {error.strerror}") from None
        pending = [top.entries()]
        while pending:
            entry = next(pending[-1], None)
            if entry is None:
                pending.pop()
                continue
            try:
                below = self._visit(entry, root, typed, top.rules)
                if below is not None:
                    pending.append(below.entries())
            except FileNotFoundError:
                self._collector.miss(entry.source, "vanished while the folder was read")
            except OSError as error:
                if error.errno in SHORTAGES:  # which the next entry would meet, too
                    raise OSError(error.errno, error.strerror, entry.source) from None
                self._collector.miss(entry.source, f"cannot be read: {error.strerror}")
        for file, problem, is_missed in self._exclusion.take_problems():
            is_within = file.startswith(os.path.join(root, ""))
            name = printable(os.path.join(source, os.path.relpath(file, root)) if is_within else file)
            if is_missed:
                self._collector.miss(name, problem)
            else:
                self._collector.found.notes.append(f"{name}: {problem}")

    def _is_unwanted(self, entry: Entry, root: str, typed: str) -> bool:
        within = entry.path[len(os.path.join(root, "")) :]
        named = f"{typed}/{within}" if typed else within
        return self._collector.is_unwanted(within, named, entry.source, is_folder=entry.is_folder)

    def _visit(self, entry: Entry, root: str, typed: str, top: Rules | None) -> Level | None:
        """Reads one entry of a folder, or records why not; returns a subfolder. Raises OSError."""
        if reason := reason_to_leave_out(entry, root):
            self._collector.skip(entry.source, reason)
            return None
        if self._collector.has_patterns and self._is_unwanted(entry, root, typed):
            return None
        if isinstance(entry.status, OSError):
            raise entry.status
        rules = entry.rules
        if entry.is_link:
            rules, ignored = self._exclusion.of_link(entry.real, root, top, is_folder=entry.is_folder)
            if ignored:
                self._collector.skip(entry.source, "a symbolic link to something ignored")
                return None
        if self._collector.already_read(entry.real, entry.source, walked=not entry.is_link):
            return None
        if entry.is_folder:
            self._collector.reached.note(entry.real, entry.source)
            level = Level(entry.path, entry.real, entry.source)
            level.rules = self._exclusion.inside(entry.real, rules)
            return level
        if not stat.S_ISREG(entry.status.st_mode):
            self._collector.skip(entry.source, f"a {kind(entry.status.st_mode)}, not a file")
            return None
        try:
            with naming(entry.source):
                raw, changed = read_regular_file(entry.path, partial(self._collector.content.check, entry.path))
                if changed:
                    self._collector.miss(entry.source, "changed while it was read")
                else:
                    self._collector.add(
                        entry.source, raw, entry.path, entry.real, walked=not entry.is_link, is_named=False
                    )
        except NOT_READ as error:
            self._collector.skip(entry.source, str(error))
        except DocumentMemoryError as error:
            if not self._collector.skip_unreadable:
                raise
            self._collector.skip(entry.source, str(error).removeprefix(f"{entry.source}: "))
        return None
