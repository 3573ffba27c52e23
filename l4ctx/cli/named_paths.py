"""Interprets paths on the command line: patterns that the shell did not expand, typos, and a misplaced question.

Only looks at names.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from l4ctx.documents.lines import split_range
from l4ctx.errors import UsageError
from l4ctx.formatting import counted, printable
from l4ctx.machine.suggestions import closest, is_missing

SHOWN_CHARACTERS = 60  # most characters of a question that a message quotes
_WORD = re.compile(r"[^\W_][\w'’-]*[?!.,:;]*")


@dataclass(frozen=True)
class NamedPaths:
    """What is to be read, as it was typed: paths, and a file that lists more of them."""

    paths: Sequence[str]
    files_from: Path | None = None  # - is standard input
    null: bool = False  # what is listed ends with NUL characters
    are_in_git: bool = False  # in commits, and perhaps not in the work tree


def listed_paths(content: bytes, *, null: bool) -> list[str]:
    """The paths in a list: one a line, or each ended by a NUL character. A `-` among them is a file's name."""
    names = content.split(b"\0") if null else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return ["./-" if name == b"-" else os.fsdecode(name) for name in names if name]


def meant_paths(paths: Sequence[str], tell: Callable[[str], object], *, question: str | None = None) -> list[str]:
    """The paths, with patterns expanded where no file has that name; `tell` gets a note about each pattern.

    `question` is the argument before the paths, if that is the question. Raises UsageError for a missing path, and if
    the question is itself an existing path.
    """
    found: list[str] = []
    missing: list[str] = []
    for path in paths:
        without_range, lines = split_range(path)
        if not is_missing(without_range):
            found.append(path)
        elif matches := _matches(without_range):
            tell(f"{printable(path)}: taken as a pattern, {counted(len(matches), 'path')}")
            found += matches if lines is None else [f"{match}:{lines}" for match in matches]
        else:
            missing.append(without_range)
    if question is not None and os.path.exists(question):
        raise UsageError(_question_is_a_path(question, paths, missing))
    if missing:
        raise UsageError(_missing(missing, paths, question))
    return found


def _matches(pattern: str) -> list[str]:
    """A pattern's matches in byte order; for one with **, only files, if there are any."""
    import glob

    if not glob.has_magic(pattern):
        return []
    matches = sorted(glob.glob(pattern, recursive=True), key=os.fsencode)
    files = [path for path in matches if not os.path.isdir(path)] if "**" in pattern else []
    return files or matches


def _question_is_a_path(question: str, paths: Sequence[str], missing: Sequence[str]) -> str:
    name = printable(question)
    kind = "folder" if os.path.isdir(question) else "file"
    if not paths:
        return (
            f"{name}: the name of a {kind}, and no question about it: l4ctx ask QUESTION {_quoted(question)} "
            "(where that is the question, give it with --question-file)"
        )
    if paths[0] in missing:
        return (
            f"{printable(paths[0])}: no such file or folder, but {name} is a {kind}: are they swapped? The "
            f"question comes first: l4ctx ask {_quoted(paths[0])} {_quoted(question)}"
        )
    return (
        f"{name}: the name of a {kind}, where the question is expected: l4ctx ask QUESTION {_quoted(question)} ... "
        "(where that is the question, give it with --question-file)"
    )


def _missing(missing: Sequence[str], paths: Sequence[str], question: str | None) -> str:
    import glob

    path = missing[0]
    also = f" (nor {counted(len(missing) - 1, 'other path')})" if len(missing) > 1 else ""
    meant = closest(path)
    words = [word for word in missing if _WORD.fullmatch(word)]
    is_unquoted = question is not None and not re.search(r"\s", question) and paths[0] in words
    if question is not None and is_unquoted and (meant is None or len(words) > 1):
        sentence = [question, *itertools.takewhile(lambda word: word in words, paths)]
        rest = "".join(f" {_quoted(other)}" for other in paths[len(sentence) - 1 :][:3])
        return (
            f"{printable(path)}: no such file or folder{also}; if it belongs to the question, put that in quotes: "
            f"l4ctx ask {_quoted(' '.join(sentence))}{rest}"
        )
    if meant is not None:
        return f"{printable(path)}: no such file or folder{also}; did you mean {printable(meant)}?"
    if glob.has_magic(path):
        return f"{printable(path)}: no such file or folder, and nothing matches it as a pattern{also}"
    parent = os.path.dirname(path.rstrip("/"))
    while parent and is_missing(os.path.dirname(parent) or "."):
        parent = os.path.dirname(parent)
    where = f": there is no {printable(parent)}" if parent and is_missing(parent) else " (check the spelling)"
    return f"{printable(path)}: no such file or folder{also}{where}"


def _quoted(text: str) -> str:
    """Quoted as a shell argument, truncated if it is long."""
    return shlex.quote(printable(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."))
