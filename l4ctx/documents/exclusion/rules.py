"""Which exclusion rules apply in a folder: git's own answer in a work tree, else those of the pattern files.

`git` asks git, `gitignore` reads pattern files, and `git_config` finds those that are not `.gitignore` files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from l4ctx.documents.exclusion.git import GitError, GitRules, GitSlowError, ask_git, git_program
from l4ctx.documents.exclusion.git_config import common_folder, core_settings
from l4ctx.documents.exclusion.gitignore import (
    PatternFile,
    PatternFileError,
    PatternRules,
    is_utf16,
    read_patterns,
    read_start,
)

UTF_16 = "is UTF-16, which git does not read as text: its rules do not hold (save it as UTF-8)"


class Rules(Protocol):
    """What is left out of a folder."""

    def reason(self, path: str, *, is_folder: bool) -> str | None:
        """Why the entry at `path`, below a folder that is not ignored itself, is left out; None where it is not."""


class Exclusion:
    """Finds the rules of folders. All paths are absolute and real.

    What a user should know is gathered; `take_problems` hands it over.
    """

    def __init__(self) -> None:
        self._problems: dict[tuple[str, str, bool], None] = {}
        self._git = git_program()
        self._roots: dict[str, Rules] = {}
        self._linked: dict[str, Rules | None] = {}

    def take_problems(self) -> list[tuple[str, str, bool]]:
        """What was found since the last call: a file, what is wrong with it, and whether it should have been read."""
        found, self._problems = list(self._problems), {}
        return found

    def top(self, folder: str) -> Rules | None:
        """The rules of a folder that a user names. What would ignore the folder itself does not hold in it."""
        self._linked.clear()
        lineage = [folder, *map(str, Path(folder).parents)]
        depth = next((n for n, each in enumerate(lineage) if _is_root(each)), 0)
        if depth == 0:
            return self.inside(folder, None)
        root = lineage[depth]
        rules, is_ignored = self._patterns_above(lineage[depth::-1])
        asked = None if is_ignored else self._ask(folder, root)
        return self.inside(folder, asked or rules)

    def _patterns_above(self, lineage: list[str]) -> tuple[PatternRules | None, bool]:
        """The patterns that hold in the last folder of a lineage, from its work tree on; and if it is ignored."""
        rules: PatternRules | None = self._repository_patterns(lineage[0])
        is_ignored = False
        for current in lineage:
            if rules is not None and current != lineage[0] and rules.reason(current, is_folder=True):
                rules, is_ignored = None, True
            if current != lineage[-1]:
                rules = self._patterns_in(current, rules)
        return rules, is_ignored

    def inside(self, folder: str, rules: Rules | None) -> Rules | None:
        """The rules in `folder`, given those for its own entry. Raises OSError."""
        if _is_root(folder):
            if folder not in self._roots:
                self._roots[folder] = self._ask(folder, folder) or self._repository_patterns(folder)
            rules = self._roots[folder]
        if isinstance(rules, GitRules):
            self._tell_of_encoding(folder)
            return rules
        assert rules is None or isinstance(rules, PatternRules)
        return self._patterns_in(folder, rules)

    def of_link(self, target: str, top: str, rules: Rules | None, *, is_folder: bool) -> tuple[Rules | None, bool]:
        """The rules for what a link inside the folder `top`, which has `rules`, leads to; and if that is ignored."""
        current = top
        for part in os.path.relpath(target, top).split(os.sep):
            if current != top:
                if current not in self._linked:
                    self._linked[current] = self.inside(current, rules)
                rules = self._linked[current]
            current = os.path.join(current, part)
            if rules is not None and rules.reason(current, is_folder=is_folder or current != target):
                return rules, True
        return rules, False

    def _ask(self, folder: str, root: str) -> GitRules | None:
        """git's own answer; None where there is none."""
        if self._git is None:
            return None
        try:
            return ask_git(self._git, folder, root)
        except GitError as error:
            self._tell(
                os.path.join(root, ".git"),
                f"git does not say what is ignored ({error}); .gitignore files, "
                ".git/info/exclude and core.excludesFile hold",
            )
            if isinstance(error, GitSlowError):
                self._git = None  # once is enough
            return None

    def _repository_patterns(self, root: str) -> PatternRules:
        """The patterns of a work tree that are in none of its folders."""
        common = common_folder(root)
        settings = core_settings(common)
        rules = PatternRules(root, PatternFile(b""), "", ignore_case=settings.ignore_case)
        for path, words in (
            (settings.excludes_file and os.path.join(root, settings.excludes_file), "ignored by core.excludesFile"),
            (os.path.join(common, "info", "exclude"), "ignored by .git/info/exclude"),
        ):
            try:
                content = read_patterns(path, follow_link=True) if path else None
            except PatternFileError as error:
                self._tell(path, str(error))
            except OSError as error:
                self._tell(path, f"cannot be read: {error.strerror}")
            else:
                rules = self._before(rules, root, path, content, words) if content else rules
        return rules

    def _patterns_in(self, folder: str, above: PatternRules | None) -> PatternRules | None:
        """The patterns of a folder's `.gitignore` before those `above`."""
        path = os.path.join(folder, ".gitignore")
        try:
            content = read_patterns(path, follow_link=False)
        except PatternFileError as error:
            self._tell(path, str(error))
            return above
        except OSError as error:
            self._tell(path, f"cannot be read: {error.strerror}", missed=True)
            return above
        return self._before(above, folder, path, content, "ignored by .gitignore") if content else above

    def _before(self, above: PatternRules | None, folder: str, path: str, content: bytes, words: str) -> PatternRules:
        """The patterns in `content` before those `above`."""
        if is_utf16(content):
            self._tell(path, UTF_16)
        ignore_case = above is not None and above.ignore_case
        return PatternRules(folder, PatternFile(content, ignore_case=ignore_case), words, above, ignore_case)

    def _tell_of_encoding(self, folder: str) -> None:
        path = os.path.join(folder, ".gitignore")
        try:
            if is_utf16(read_start(path, 2, follow_link=False)):
                self._tell(path, UTF_16)
        except FileNotFoundError:
            pass
        except PatternFileError as error:
            self._tell(path, str(error))
        except OSError as error:
            self._tell(path, f"cannot be read: {error.strerror}", missed=True)

    def _tell(self, file: str, problem: str, *, missed: bool = False) -> None:
        self._problems[file, problem, missed] = None


def _is_root(folder: str) -> bool:
    """Whether a folder is the top of a work tree, as its entry .git says. Raises OSError."""
    try:
        os.lstat(os.path.join(folder, ".git"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
