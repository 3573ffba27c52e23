"""What `.gitignore` files leave out of a folder, as git has it for each entry by itself.

Walking folders is left to `l4ctx.documents`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec
from pathspec.pattern import Pattern

from l4ctx.files import read_regular_file


@dataclass(frozen=True)
class IgnoreRules:
    """The rules of one `.gitignore`, in front of those of the folders above it.

    pathspec's own specification matches whatever lies below a match; a walk needs to know of each entry by itself,
    as git does, so the patterns are asked one by one: those without an inner slash about the name alone.
    """

    folder: str
    patterns: tuple[tuple[Pattern, bool, bool, bool], ...]  # last first: (pattern, folders only, name alone, deep)
    above: IgnoreRules | None
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


def read_rules(folder: str, above: IgnoreRules | None) -> IgnoreRules:
    """The rules of `folder/.gitignore`, if there are any that can be read, in front of those `above`."""
    patterns: list[tuple[Pattern, bool, bool, bool]] = []
    problems: list[str] = []
    try:
        lines = (
            os.fsdecode(read_regular_file(os.path.join(folder, ".gitignore"))[0]).removeprefix("\ufeff").split("\n")
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
    return IgnoreRules(folder, tuple(reversed(patterns)), above, tuple(problems))


def rules_above(folder: str) -> IgnoreRules | None:
    """The rules that the enclosing git repository has for `folder`; none of those that ignore the folder itself."""
    above = [folder, *map(str, Path(folder).parents)]
    depth = next((n for n, each in enumerate(above) if os.path.lexists(os.path.join(each, ".git"))), -1)
    rules: IgnoreRules | None = None
    for current in reversed(above[: depth + 1]):
        if rules is not None and rules.ignored(current, is_folder=True):
            rules = None  # named although ignored
        if current != folder and os.path.lexists(os.path.join(current, ".gitignore")):
            rules = read_rules(current, rules)
    return rules
