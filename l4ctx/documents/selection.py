"""Which of the files that are reached are read, and how much of them; what patterns choose among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from l4ctx.documents.exclusion.gitignore import PatternFile


@dataclass(frozen=True)
class Selection:
    """Patterns are those of `.gitignore`: of several that match, the last one decides.

    They are matched below the folder that is read; those with a slash in them are also matched with the folder's path
    as it was given. `include` and `exclude` hold for files that are named themselves, too.
    """

    include: Sequence[str] = ()  # no patterns: every file
    exclude: Sequence[str] = ()
    max_file_size: int | None = None  # bytes
    line_numbers: bool = False
    keep_duplicates: bool = False  # files of a folder whose content was read already
    git_ref: str | None = None  # a commit, which files are read of instead
    diff: str | None = None  # two commits, A..B or A...B, whose difference is read instead


class Patterns:
    """What `include` and `exclude` say about paths, which are relative and have slashes."""

    def __init__(self, selection: Selection) -> None:
        self._include = [_Matcher(selection.include)] if selection.include else []
        self._exclude = [_Matcher(selection.exclude)] if selection.exclude else []

    def reason(self, within: str, typed: str, *, is_folder: bool) -> str | None:
        """Why a file, or a folder with all that is in it, is left out; None where it is not.

        `within` is its path below the folder that is read; `typed` with that folder's path before it.
        """
        for matcher in self._exclude:
            if matcher.matches(within, typed, is_folder=is_folder):
                return "left out by --exclude"
        for matcher in self._include:
            if not is_folder and not matcher.matches(within, typed, is_folder=False):
                return "not among --include"
        return None


class _Matcher:
    def __init__(self, patterns: Sequence[str]) -> None:
        self._within = _compiled(patterns)
        with_folders = [pattern for pattern in patterns if "/" in pattern.removeprefix("!").strip("/")]
        self._typed = _compiled(with_folders) if with_folders else None

    def matches(self, within: str, typed: str, *, is_folder: bool) -> bool:
        """Whether the path, or a folder that it is in, is matched."""
        return _matches(self._within, within, is_folder=is_folder) or (
            self._typed is not None and typed != within and _matches(self._typed, typed, is_folder=is_folder)
        )


def _compiled(patterns: Sequence[str]) -> PatternFile:
    lines = (f"\\{pattern}" if pattern.startswith("#") else pattern for pattern in patterns)
    return PatternFile(b"\n".join(map(os.fsencode, lines)))


def _matches(patterns: PatternFile, path: str, *, is_folder: bool) -> bool:
    """A folder that is matched settles what is in it, as in git."""
    parts = os.fsencode(path).split(b"/")
    for count in range(1, len(parts) + 1):
        is_last = count == len(parts)
        if patterns.ignores(b"/".join(parts[:count]), is_folder=is_folder or not is_last):
            return True
    return False
