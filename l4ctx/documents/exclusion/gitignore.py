"""What pattern files leave out of a folder, as in git: `.gitignore`, `.git/info/exclude` and core.excludesFile."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from l4ctx.documents.exclusion.wildmatch import PatternSet, literal_length
from model.folder import check_whole

MOST_BYTES = 2 << 20  # of a file of patterns: tens of thousands of lines, which take some seconds
AUTOMATON_BYTES = 1 << 14  # of patterns that are matched at once


class PatternFileError(Exception):
    """A pattern file has no effect; the message says why."""


@dataclass
class _Patterns:
    """Numbered patterns, by what is literal at their beginning. The wildcards of each such group are one automaton.

    As in git, what follows the literal part is matched by itself: the stars of `a**/b` are at the beginning of that.
    """

    pathname: bool
    ignore_case: bool
    _exact: dict[bytes, int] = field(default_factory=dict)
    _wild: dict[bytes, tuple[list[int], list[bytes]]] = field(default_factory=dict)
    _sets: dict[bytes, list[tuple[list[int], PatternSet]]] = field(default_factory=dict)
    _lengths: list[int] = field(default_factory=list)

    def add(self, number: int, pattern: bytes) -> None:
        length = literal_length(pattern)
        literal = pattern[:length].lower() if self.ignore_case else pattern[:length]
        if length == len(pattern):
            self._exact[literal] = number
            return
        numbers, rests = self._wild.setdefault(literal, ([], []))
        numbers.append(number)
        rests.append(pattern[length:])

    def last(self, text: bytes) -> int:
        """The number of the last pattern that matches `text`; -1 where none does."""
        if len(self._lengths) == 0 and self._wild:
            self._lengths = sorted({len(literal) for literal in self._wild})
        folded = text.lower() if self.ignore_case else text
        found = self._exact.get(folded, -1)
        for length in self._lengths:
            if length > len(text):
                break
            literal = folded[:length]
            if literal in self._wild and self._wild[literal][0][-1] > found:
                found = max(found, self._last_wild(literal, text[length:]))
        return found

    def _last_wild(self, literal: bytes, rest: bytes) -> int:
        if literal not in self._sets:
            self._sets[literal] = list(self._automata(*self._wild[literal]))
        for numbers, automaton in self._sets[literal]:
            if (at := automaton.last(rest)) >= 0:
                return numbers[at]
        return -1

    def _automata(self, numbers: list[int], patterns: list[bytes]) -> Iterator[tuple[list[int], PatternSet]]:
        """The patterns in groups that fit into a processor's cache, last one first."""
        stop, size = len(patterns), 0
        for start in reversed(range(len(patterns))):
            size += len(patterns[start])
            if start == 0 or size > AUTOMATON_BYTES:
                automaton = PatternSet(patterns[start:stop], pathname=self.pathname, ignore_case=self.ignore_case)
                yield numbers[start:stop], automaton
                stop, size = start, 0


class PatternFile:
    """The patterns of one file: the last one that matches decides."""

    def __init__(self, content: bytes, *, ignore_case: bool = False) -> None:
        self._negated = bytearray()
        self._ignore_case = ignore_case
        self._sets: dict[tuple[bool, bool], _Patterns] = {}  # by whether for folders only, and whether for whole paths
        for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            self._add(line)

    def _add(self, line: bytes) -> None:
        pattern = _without_trailing_blanks(line.removesuffix(b"\r").partition(b"\0")[0])
        if pattern.startswith(b"#"):
            return
        body = pattern.removeprefix(b"!")
        name = body.removesuffix(b"/")
        if name:
            pathname = b"/" in name
            kind = (body != name, pathname)
            if kind not in self._sets:
                self._sets[kind] = _Patterns(pathname, self._ignore_case)
            self._sets[kind].add(len(self._negated), name[pathname and name[0] == ord("/") :])
            self._negated.append(body != pattern)

    def ignores(self, path: bytes, *, is_folder: bool) -> bool | None:
        """Whether the file leaves out `path`, relative to its folder; None where no pattern is about it."""
        name = path.rpartition(b"/")[2]
        last = -1
        for (folders_only, pathname), patterns in self._sets.items():
            if is_folder or not folders_only:
                last = max(last, patterns.last(path if pathname else name))
        return None if last < 0 else not self._negated[last]


def _without_trailing_blanks(line: bytes) -> bytes:
    """As git trims: blanks alone, and not one that is escaped."""
    kept = line.rstrip(b" ")
    if kept != line and (len(kept) - len(kept.rstrip(b"\\"))) % 2:
        kept += b" "
    return kept


def read_patterns(path: str, *, follow_link: bool) -> bytes | None:
    """The content of a file of patterns; None where there is none.

    Raises PatternFileError for what is not such a file, and OSError.
    """
    try:
        content = read_start(path, MOST_BYTES + 1, follow_link=follow_link)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(content) > MOST_BYTES:
        raise PatternFileError(f"is larger than {MOST_BYTES >> 20} MiB: it has no effect")
    return content


def is_utf16(content: bytes) -> bool:
    """Whether a file of patterns is in UTF-16, with a mark or without. git reads it byte by byte all the same."""
    return content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:2]


def read_start(path: str, most: int, *, follow_link: bool) -> bytes:
    """At most that many bytes of a regular file, without ever waiting. Raises PatternFileError and OSError."""
    if "\0" in path:
        raise PatternFileError("is no name of a file: it has no effect")
    if not follow_link and os.path.islink(path):
        raise PatternFileError("is a symbolic link, which git does not follow: it has no effect")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags | (0 if follow_link else getattr(os, "O_NOFOLLOW", 0)))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PatternFileError("is not a file: it has no effect")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(most)
    finally:
        os.close(descriptor)
    check_whole(path, len(content), min(status.st_size, most))  # else patterns would be lost
    return content


@dataclass(frozen=True)
class PatternRules:
    """What files of patterns say about the entries of a folder: its own before those of the folders above it."""

    folder: str
    patterns: PatternFile
    words: str
    above: PatternRules | None = None
    ignore_case: bool = False

    @functools.cached_property
    def prefix(self) -> int:
        """Bytes of a path before what is relative to the folder."""
        return len(os.fsencode(os.path.join(self.folder, "")))

    def reason(self, path: str, *, is_folder: bool) -> str | None:
        """Why the entry at `path`, below a folder that is not ignored itself, is left out; None where it is not."""
        rules: PatternRules | None = self
        whole = os.fsencode(path.replace(os.sep, "/"))
        while rules is not None:
            ignored = rules.patterns.ignores(whole[rules.prefix :], is_folder=is_folder)
            if ignored is not None:
                return rules.words if ignored else None
            rules = rules.above
        return None
