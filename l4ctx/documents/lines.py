"""Lines of texts: ranges of them, as in `notes.md:10-40`, and their numbers.

A line ends with a newline, as for sed and grep: the last one may end without.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from l4ctx.errors import InputError

_RANGE = re.compile(r"(.*[^/]):([0-9]{1,18})(?:(-)([0-9]{1,18})?)?", re.DOTALL)


class LinesError(InputError):
    """Lines that a document does not have."""


@dataclass(frozen=True)
class LineRange:
    """Lines `first` .. `last`, counted from 1, `last` included; None: to the end."""

    first: int
    last: int | None

    def __str__(self) -> str:
        if self.last == self.first:
            return str(self.first)
        return f"{self.first}-{'' if self.last is None else self.last}"

    def check(self, name: str) -> None:
        """Raises LinesError for a range that no file has."""
        if self.first < 1 or (self.last is not None and self.last < self.first):
            raise LinesError(f"{name}:{self}: lines count from 1, and the first one comes first, as in {name}:10-40")

    def of(self, text: str, name: str) -> str:
        """These lines of `text`, with their ends. Raises LinesError where it has fewer."""
        lines = number_of_lines(text)
        if max(self.first, self.last or 0) > lines:
            has = "1 line" if lines == 1 else f"{lines:,} lines"
            raise LinesError(f"{name} has {has}, and {self} was asked for")
        start = _after_lines(text, 0, self.first - 1)
        stop = len(text) if self.last is None else _after_lines(text, start, self.last - self.first + 1)
        return text[start:stop]


def with_range(path: str) -> tuple[str, LineRange | None]:
    """A path and the range at its end, if it has one. Says nothing about whether a file has the whole as its name."""
    found = _RANGE.fullmatch(path)
    if found is None:
        return path, None
    first = int(found[2])
    last = first if found[3] is None else int(found[4]) if found[4] else None
    return found[1], LineRange(first, last)


def split_range(path: str) -> tuple[str, LineRange | None]:
    """The same, but that a file whose name ends like a range is taken for that file."""
    without, lines = with_range(path)
    return (path, None) if lines is None or os.path.lexists(path) else (without, lines)


def number_of_lines(text: str) -> int:
    return text.count("\n") + (not text.endswith("\n") and text != "")


def numbered(text: str, first: int = 1) -> str:
    """`text` with the number of each line before it, as `grep -n` shows them; `first` is that of the first line."""
    return "".join(f"{number}:{line}" for number, line in enumerate(_lines(text), first))


def _lines(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _after_lines(text: str, start: int, count: int) -> int:
    """The offset behind `count` lines that begin at `start`."""
    for _ in range(count):
        start = text.find("\n", start) + 1 or len(text)
    return start
