"""Files, folders and standard input become documents: named, decoded text, in an order that never changes.

Everything that is left out is reported with its reason. Printing, wrapping for the prompt and tokenizing are left
to others (`l4ctx.cli`, `l4ctx.prompt`, `l4ctx.tokenizer`); PDF pages and images are only named as binaries here.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pathspec import GitIgnoreSpec
from pathspec.pattern import Pattern

from l4ctx.decoding import binary_kind, decode
from l4ctx.manifest import is_context

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class DocumentError(Exception):
    """What the user asked to read cannot be read: one line that says what, where and how to mend it."""


@dataclass(frozen=True)
class Document:
    """One text to be read.

    `source` is unique among the documents of one call, printable, and valid Unicode; `sha256` is the digest of the
    raw bytes; `text` has its byte order mark dropped and is otherwise as the file has it, line ends included.
    """

    source: str
    sha256: str
    text: str


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
        raise DocumentError(f"found no text to read in {where}: {found}{hint}")


def read_documents(paths: Iterable[str | os.PathLike[str]], *, stdin: BinaryIO | None) -> DocumentSet:
    """Read every file, folder and `-` (standard input) of `paths`, in the order given.

    Folders are walked in the order of their paths' bytes; `.gitignore` rules hold, hidden and binary files and
    links that lead out of the folder are left out and listed in `skipped`. A file named itself is read even if
    hidden or ignored. A file reached twice is read once. Raises DocumentError for a path that is missing, is not
    a file or folder, or cannot be read, and for `-` given twice or without `stdin`.
    """
    reader = _Reader(stdin)
    for path in paths:
        reader.read_argument(os.fsdecode(path))
    return reader.found


def printable(path: str) -> str:
    """`path` on one line of valid Unicode: control characters and bytes that are not UTF-8 as backslash escapes."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), path)


def _file_source(path: str) -> str:
    """The name of a file argument: as typed, normalised, without what leads out of or to the top of the tree."""
    parts = os.path.normpath(path).replace(os.sep, "/").split("/")
    return printable("/".join(part for part in parts if part not in ("", "..")))


def _folder_source(path: str) -> str:
    """The name of a folder argument: its last component; of the current folder, none."""
    name = os.path.basename(os.path.normpath(path))
    return printable({os.curdir: "", os.pardir: os.path.basename(os.path.abspath(path))}.get(name, name))


@dataclass(frozen=True)
class _IgnoreRules:
    """The rules of one `.gitignore`, in front of those of the folders above it.

    pathspec's own specification matches whatever lies below a match; a walk needs to know of each entry by itself,
    as git does, so the patterns are asked one by one: those without an inner slash about the name alone.
    """

    folder: str
    patterns: tuple[tuple[Pattern, bool, bool, bool], ...]  # last first: (pattern, folders only, name alone, deep)
    above: _IgnoreRules | None
    problems: tuple[str, ...] = ()

    def ignored(self, path: str, *, is_folder: bool) -> bool:
        """Whether the entry at `path`, below a folder that is not ignored itself, is left out."""
        within = path[len(self.folder.rstrip(os.sep)) + 1 :].replace(os.sep, "/")
        parent, _, name = within.rpartition("/")
        for pattern, folders_only, name_alone, deep in self.patterns:
            if (folders_only and not is_folder) or not pattern.match_file(name if name_alone else within):
                continue
            if name_alone or deep or not parent or not pattern.match_file(parent):
                return bool(pattern.include)
        return self.above is not None and self.above.ignored(path, is_folder=is_folder)


def _read_rules(folder: str, above: _IgnoreRules | None) -> _IgnoreRules:
    """The rules of `folder/.gitignore`, if there are any that can be read, in front of those `above`."""
    patterns: list[tuple[Pattern, bool, bool, bool]] = []
    problems: list[str] = []
    try:
        lines = (
            os.fsdecode(_read_regular_file(os.path.join(folder, ".gitignore"))[0]).removeprefix("\ufeff").split("\n")
        )
    except OSError as error:
        lines, problems = [], [f"cannot be read: {error.strerror}"]
    for number, line in enumerate(lines, start=1):
        rule = re.sub(r"(?<!\\)[ \t\r]+$", "", line)  # an escaped blank at the end stands
        body = rule.rstrip("/")
        try:
            found = list(GitIgnoreSpec.from_lines([body]).patterns)
        except ValueError:
            problems.append(f"line {number} is not a pattern")
            continue
        inner = body.removeprefix("!")
        name_alone, deep = "/" not in inner.removeprefix("**/"), inner.endswith("/**")
        patterns += [(each, body != rule, name_alone, deep) for each in found if each.include is not None]
    return _IgnoreRules(folder, tuple(reversed(patterns)), above, tuple(problems))


def _rules_above(folder: str) -> _IgnoreRules | None:
    """The rules that the enclosing git repository has for `folder`; none of those that ignore the folder itself."""
    above = [folder, *map(str, Path(folder).parents)]
    depth = next((n for n, each in enumerate(above) if os.path.lexists(os.path.join(each, ".git"))), -1)
    rules: _IgnoreRules | None = None
    for current in reversed(above[: depth + 1]):
        if rules is not None and rules.ignored(current, is_folder=True):
            rules = None  # named although ignored
        if current != folder and os.path.lexists(os.path.join(current, ".gitignore")):
            rules = _read_rules(current, rules)
    return rules


@dataclass(frozen=True)
class _Entry:
    """Something met in a folder, still to be looked at."""

    path: str
    source: str
    rules: _IgnoreRules | None
    is_folder: bool
    is_link: bool


class _Reader:
    """The state of one `read_documents` call."""

    def __init__(self, stdin: BinaryIO | None) -> None:
        self.found = DocumentSet()
        self._stdin = stdin
        self._stdin_read = False
        self._sources: set[str] = set()
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
        raise DocumentError(f"{printable(path)}: is a {_kind(mode)}, not a file (pipe its content in and use -)")

    def _read_stdin(self) -> None:
        if self._stdin is None:
            raise DocumentError("- stands for standard input, but there is none to read")
        if self._stdin_read:
            raise DocumentError("- (standard input) is given twice; it can be read only once")
        self._stdin_read = True
        try:
            raw = self._stdin.read()
        except OSError as error:
            raise DocumentError(f"standard input cannot be read: {error.strerror}") from None
        self._add("stdin", raw)

    def _read_pipe(self, path: str) -> None:
        """A pipe named by the user, such as the shell's <(command): waits for what is written into it."""
        try:
            with open(path, "rb") as pipe:
                raw = pipe.read()
        except OSError as error:
            raise DocumentError(f"{printable(path)}: cannot be read: {error.strerror}") from None
        self._add(_file_source(path), raw)

    def _read_named_file(self, path: str, real: str) -> None:
        source = _file_source(path)
        if self._already_read(real, source):
            return
        try:
            raw, changed = _read_regular_file(path)
        except OSError as error:
            raise DocumentError(f"{printable(path)}: cannot be read: {error.strerror}") from None
        if changed:
            self.found.notes.append(f"{source}: changed while it was read")
        self._seen[real] = self._add(source, raw)

    def _walk(self, path: str, root: str) -> None:
        source = _folder_source(path)
        if is_context(root):
            raise DocumentError(f"{printable(path)}: a saved context, not documents (--context answers from it)")
        if self._already_read(root, source or "."):
            return
        self._seen[root] = source or "."
        try:
            pending = self._list(root, source, _rules_above(root))
        except OSError as error:
            raise DocumentError(f"{printable(path)}: the folder cannot be read: {error.strerror}") from None
        while pending:
            entry = pending.pop()
            try:
                pending += self._visit(entry, root)
            except FileNotFoundError:
                self._skip(entry.source, "vanished while the folder was read")
            except OSError as error:
                self._skip(entry.source, f"cannot be read: {error.strerror}")

    def _list(self, path: str, source: str, rules: _IgnoreRules | None) -> list[_Entry]:
        """The entries of a folder, last one first: to be popped in the order of their paths' bytes."""
        with os.scandir(path) as scan:
            found = list(scan)
        if any(entry.name == ".gitignore" for entry in found):
            rules = _read_rules(path, rules)
            self.found.notes += [f"{source}/.gitignore: {problem}" for problem in rules.problems]
        entries = []
        for entry in found:
            is_folder = os.path.isdir(entry.path)  # of a link: what it leads to; False where that is a loop
            name = f"{source}/{printable(entry.name)}".lstrip("/")
            listed = _Entry(entry.path, name, rules, is_folder, entry.is_symlink())
            entries.append((os.fsencode(entry.name) + b"/" * is_folder, listed))
        return [entry for _, entry in sorted(entries, key=lambda pair: pair[0], reverse=True)]

    def _visit(self, entry: _Entry, root: str) -> list[_Entry]:
        """Read one entry of a folder, or say why not; the entries of a sub-folder are returned."""
        if reason := _reason_to_leave_out(entry, root):
            self._skip(entry.source, reason)
            return []
        if self._already_read(real := os.path.realpath(entry.path), entry.source):
            return []
        if entry.is_folder:
            self._seen[real] = entry.source
            return self._list(entry.path, entry.source, entry.rules)
        if not stat.S_ISREG(mode := os.stat(entry.path).st_mode):
            self._skip(entry.source, f"a {_kind(mode)}, not a file")
            return []
        raw, changed = _read_regular_file(entry.path)
        if changed:
            self._skip(entry.source, "changed while it was read")
        else:
            self._seen[real] = self._add(entry.source, raw)
        return []

    def _already_read(self, real: str, source: str) -> bool:
        if real in self._seen:
            self._skip(source, f"the same as {self._seen[real]}")
        return real in self._seen

    def _add(self, source: str, raw: bytes) -> str:
        """Keep `raw` as a document if it is text; return the source under which it is known."""
        if binary := binary_kind(raw):
            self._skip(source, binary)
            return source
        text, note = decode(raw)
        if not text or text.isspace():
            self._skip(source, "empty" if not raw else "nothing but white space")
            return source
        unique, count = source, 1
        while unique in self._sources:
            count += 1
            unique = f"{source} ({count})"
        self._sources.add(unique)
        if note:
            self.found.notes.append(f"{unique}: {note}")
        self.found.documents.append(Document(unique, hashlib.sha256(raw).hexdigest(), text))
        return unique

    def _skip(self, source: str, reason: str) -> None:
        self.found.skipped.append(Skipped(source, reason))


def _reason_to_leave_out(entry: _Entry, root: str) -> str | None:
    """Why an entry of the folder `root` is not even opened, if so."""
    if os.path.basename(entry.path).startswith("."):
        return "hidden"
    if entry.is_folder and is_context(entry.path):
        return "a saved context"
    if entry.rules is not None and entry.rules.ignored(entry.path, is_folder=entry.is_folder and not entry.is_link):
        return "ignored by .gitignore"
    if not entry.is_link:
        return None
    if not os.path.exists(entry.path):
        return "a symbolic link that leads nowhere"
    real = os.path.realpath(entry.path)
    if entry.is_folder and (os.path.realpath(os.path.dirname(entry.path)) + os.sep).startswith(real + os.sep):
        return "a symbolic link to a folder that it lies in (a loop)"
    if not real.startswith(root.rstrip(os.sep) + os.sep):
        return "a symbolic link that leaves the folder"
    if any(part.startswith(".") for part in os.path.relpath(real, root).split(os.sep)):
        return "a symbolic link to something hidden"
    return None


def _kind(mode: int) -> str:
    return {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device or folder")


def _read_regular_file(path: str) -> tuple[bytes, bool]:
    """The bytes of a file, and whether it changed meanwhile. Never waits for a pipe put in the file's place."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise OSError(0, f"became a {_kind(before.st_mode)}")
        raw = file.readall()
        after = os.fstat(file.fileno())
    return raw, (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
