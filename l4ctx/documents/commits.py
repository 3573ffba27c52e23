"""Reads files of a commit, or what differs between two, as documents: nothing of the work tree."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial

from l4ctx.documents.collecting import Collector, file_source
from l4ctx.documents.content import NOT_READ, FileSizeError, naming
from l4ctx.documents.document import DocumentError
from l4ctx.documents.folder import folder_source
from l4ctx.documents.lines import LineRange, with_range
from l4ctx.documents.repository import FILES, LINK, SUBMODULE, MissingObjectError, Repository, TreeFile
from l4ctx.formatting import printable

_LONGEST_LINK = 4096
_ESCAPE = re.compile(rb'\\([0-7]{3}|[abtnvfr"\\])')
_ESCAPES = {b"a": b"\a", b"b": b"\b", b"t": b"\t", b"n": b"\n", b"v": b"\v", b"f": b"\f", b"r": b"\r"}


class _Commits:
    """The repositories that were opened, and a commit of each."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._opened: dict[str, Repository] = {}
        self._known: dict[tuple[str, str], str] = {}

    def around(self, path: str) -> tuple[Repository, str]:
        if not path:
            raise DocumentError("a path is empty (is a shell variable unset?)")
        repository, within = Repository.around(path)
        return self._opened.setdefault(repository.root, repository), within

    def commit(self, repository: Repository, name: str, option: str) -> str:
        key = repository.root, name
        if key not in self._known:
            self._known[key] = repository.commit(name, option)
            self._collector.found.notes.append(f"{printable(name)} is commit {self._known[key][:12]}")
        return self._known[key]

    def close(self) -> None:
        for repository in self._opened.values():
            repository.close()


class CommitReader:
    """Reads paths as they are in a commit. Close it."""

    def __init__(self, collector: Collector, name: str) -> None:
        self._collector, self._name = collector, name
        self._commits = _Commits(collector)
        self._files: dict[str, dict[str, TreeFile]] = {}

    def close(self) -> None:
        self._commits.close()

    def read_argument(self, path: str) -> None:
        """Reads a file, or what a folder holds, of the commit. Raises DocumentError, and LinesError."""
        repository, within = self._commits.around(path)
        if repository.root not in self._files:
            commit = self._commits.commit(repository, self._name, "--git-ref")
            self._files[repository.root] = repository.files(commit)
        files = self._files[repository.root]
        if within in files:
            return self._read_named(repository, files[within], file_source(path), None)
        inside = [file for name, file in files.items() if not within or name.startswith(f"{within}/")]
        if inside:
            return self._read_folder(repository, inside, path, within)
        (without, lines), (named, _) = with_range(within), with_range(path)
        if lines is None or without not in files:
            raise DocumentError(f"{printable(path)}: is not in {printable(self._name)}")
        lines.check(printable(named))
        return self._read_named(repository, files[without], file_source(named), lines)

    def _read_named(self, repository: Repository, file: TreeFile, name: str, lines: LineRange | None) -> None:
        collector = self._collector
        source = name if lines is None else f"{name}:{lines}"
        if file.mode not in FILES:
            raise DocumentError(f"{source}: {self._what_else(repository, file)}")
        key = f"{repository.root}\0{file.path}\0{lines}"
        if collector.already_read(key, source) or collector.is_unwanted(name, name, source):
            return
        try:
            with naming(source):
                raw = repository.read(file, self._check(file, is_part=lines is not None))
                collector.add(source, raw, None, key, lines=lines)
        except FileSizeError as error:
            raise DocumentError(f"{source}: {error}") from None
        except MissingObjectError:
            raise DocumentError(f"{source}: {_MISSING}") from None
        except NOT_READ as error:
            collector.skip(source, str(error))

    def _read_folder(self, repository: Repository, files: list[TreeFile], path: str, within: str) -> None:
        """Leaves out what a walk of the folder would leave out; git does not keep what it ignores."""
        source, typed = folder_source(path), file_source(path)
        left_out = ""
        for file in files:
            below = file.path[len(within) + 1 :] if within else file.path
            if left_out and below.startswith(f"{left_out}/"):
                continue
            left_out = self._left_out(below, source, typed) or ""
            if not left_out:
                self._read_entry(repository, file, _joined(source, below))

    def _left_out(self, below: str, source: str, typed: str) -> str | None:
        """The path, or the folder with it, that is left out, which is noted; None where it is to be read."""
        parts = below.split("/")
        for count in range(1, len(parts) + 1):
            part = "/".join(parts[:count])
            if parts[count - 1].startswith("."):
                self._collector.skip(_joined(source, part), "hidden")
                return part
            if self._collector.is_unwanted(
                part, f"{typed}/{part}" if typed else part, _joined(source, part), is_folder=count < len(parts)
            ):
                return part
        return None

    def _read_entry(self, repository: Repository, file: TreeFile, source: str) -> None:
        collector = self._collector
        if file.mode not in FILES:
            return collector.skip(source, self._what_else(repository, file))
        key = f"{repository.root}\0{file.path}\0None"
        if collector.already_read(key, source):
            return None
        try:
            with naming(source):
                raw = repository.read(file, self._check(file))
                collector.add(source, raw, None, key, is_named=False)
        except MissingObjectError:
            collector.miss(source, _MISSING)
        except NOT_READ as error:
            collector.skip(source, str(error))
        return None

    def _check(self, file: TreeFile, *, is_part: bool = False) -> Callable[[bytes, int], None]:
        return partial(self._collector.content.check, None, is_part=is_part)

    def _what_else(self, repository: Repository, file: TreeFile) -> str:
        """What is no file. Links are not followed: what they lead to in the commit is read itself."""
        if file.mode == SUBMODULE:
            return f"a submodule, which has a repository of its own (commit {file.identifier[:12]})"
        if file.mode != LINK:
            return f"an entry of the unknown mode {file.mode}"
        try:
            target = repository.read(file, _check_link)
        except (MissingObjectError, _LongLinkError):
            return "a symbolic link"
        return f"a symbolic link to {printable(os.fsdecode(target))}"


_MISSING = "git does not have its content, as in a partial clone"


class _LongLinkError(Exception):
    """A link that leads to a longer path than there can be."""


def _check_link(_: bytes, size: int) -> None:
    if size > _LONGEST_LINK:
        raise _LongLinkError


class DiffReader:
    """Reads what differs between two commits, A..B, or from their common ancestor on, A...B. Close it."""

    def __init__(self, collector: Collector, between: str) -> None:
        """Raises DocumentError for what names no two commits."""
        old, dots, new = between.partition("..." if "..." in between else "..")
        if not dots:
            raise DocumentError(f"--diff {printable(between)}: name two commits, as in main..HEAD")
        self._between, self._old, self._new = between, old or "HEAD", new or "HEAD"
        self._from_common = dots == "..."
        self._collector, self._commits = collector, _Commits(collector)

    def close(self) -> None:
        self._commits.close()

    def read_argument(self, path: str) -> None:
        """Reads what differs in a file or folder: a document for each file. Raises DocumentError."""
        repository, within = self._commits.around(path)
        old, new = (self._commits.commit(repository, name, "--diff") for name in (self._old, self._new))
        if self._from_common:
            old = repository.merge_base(old, new)
        patch = repository.diff(old, new, within)
        if not patch:
            raise DocumentError(f"{printable(path)}: nothing in it differs in {printable(self._between)}")
        collector = self._collector
        for name, part in _by_file(patch):
            source = f"{printable(os.fsdecode(name))} (diff {printable(self._between)})"
            below = (
                os.fsdecode(name)[len(within) + 1 :] if within and os.fsdecode(name) != within else os.fsdecode(name)
            )
            if collector.is_unwanted(below, os.fsdecode(name), source):
                continue
            try:
                with naming(source):
                    collector.content.check(None, part[:8192], len(part))
                    collector.add(source, part)
            except NOT_READ as error:
                collector.skip(source, str(error))


def _by_file(patch: bytes) -> list[tuple[bytes, bytes]]:
    """A patch cut at the files that it is about, with the name of each. No line of a file begins as a part does."""
    starts = [found.start() for found in re.finditer(rb"^diff --git ", patch, re.MULTILINE)]
    parts = [patch[start:stop] for start, stop in zip(starts, [*starts[1:], len(patch)], strict=True)]
    return [(_name(part), part) for part in parts]


def _name(part: bytes) -> bytes:
    """The name of a part's file after the change, or before it where it was deleted."""
    head = re.split(rb"^(?:@@|GIT binary patch|Binary files) ", part, maxsplit=1, flags=re.MULTILINE)[0]
    for found in (
        re.search(rb'^\+\+\+ (?:b/(.*)|("b/.*"))$', head, re.MULTILINE),
        re.search(rb'^rename to (?:([^"].*)|(".*"))$', head, re.MULTILINE),
        re.search(rb'^--- (?:a/(.*)|("a/.*"))$', head, re.MULTILINE),
    ):
        if found is not None:
            name = found[1] if found[1] is not None else _unquoted(found[2])
            name = name.removesuffix(b"\t")  # of a name with blanks
            return name[2:] if found[1] is None and name[:2] in (b"a/", b"b/") else name
    both = head.split(b"\n")[0].removeprefix(b"diff --git ")  # the same name twice: a/NAME b/NAME
    half = both[: (len(both) - 1) // 2]
    return (_unquoted(half) if half.startswith(b'"') else half)[2:]


def _unquoted(name: bytes) -> bytes:
    def plain(found: re.Match[bytes]) -> bytes:
        what = found[1]
        return bytes([int(what, 8) & 255]) if len(what) == 3 else _ESCAPES.get(what, what)

    return _ESCAPE.sub(plain, name[1:-1])


def _joined(source: str, below: str) -> str:
    return f"{source}/{printable(below)}" if source else printable(below)
