"""The two settings of git that determine what is ignored, for when git itself cannot be asked.

Only the keys themselves are read, not files that a configuration includes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from l4ctx.documents.exclusion.gitignore import PatternFileError, read_start

_MOST_BYTES = 1 << 20  # of a configuration
_SECTION = re.compile(r"\s*\[\s*([^\]\s\"]*)\s*(\"(?:[^\"\\]|\\.)*\"\s*)?\]")
_KEY = re.compile(r"\s*([A-Za-z][A-Za-z0-9-]*)[ \t]*(?:=[ \t]*(.*))?$", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "b": "\b"}


@dataclass(frozen=True)
class CoreSettings:
    """`excludes_file` may be relative to the work tree; empty: none."""

    excludes_file: str
    ignore_case: bool


def common_folder(root: str) -> str:
    """Where the repository of a work tree has its configuration: `.git`, or where that leads to."""
    folder = os.path.join(root, ".git")
    if not os.path.isdir(folder):
        folder = os.path.join(root, _first_line(folder).removeprefix("gitdir:").strip())
    common = _first_line(os.path.join(folder, "commondir"))
    return os.path.normpath(os.path.join(folder, common)) if common else folder


def core_settings(common: str) -> CoreSettings:
    """As the system, the user and the repository have them, the last one first."""
    settings: dict[str, str] = {}
    home = os.path.expanduser("~")
    folder = os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"), "git")
    of_user = [os.path.join(folder, "config"), os.path.join(home, ".gitconfig")]
    if "GIT_CONFIG_GLOBAL" in os.environ:
        of_user = [os.environ["GIT_CONFIG_GLOBAL"]]
    for file in ["/etc/gitconfig", *of_user, os.path.join(common, "config")]:
        settings |= _core(_text(file))
    excludes_file = settings.get("excludesfile", os.path.join(folder, "ignore"))
    ignore_case = settings.get("ignorecase", "false").lower() in ("true", "yes", "on", "1")
    return CoreSettings(os.path.expanduser(excludes_file), ignore_case)


def _core(text: str) -> dict[str, str]:
    """The keys of the section [core], in small letters."""
    found: dict[str, str] = {}
    in_core = False
    for line in re.sub(r"\\\r?\n", "", text).split("\n"):
        if section := _SECTION.match(line):
            in_core = section[1].lower() == "core" and section[2] is None
            line = line[section.end() :]
        if in_core and (key := _KEY.match(line)):
            found[key[1].lower()] = "true" if key[2] is None else _value(key[2])
    return found


def _value(text: str) -> str:
    """A value without its quotes, escapes and comment."""
    value, quoted, kept = "", False, 0
    characters = iter(text)
    for character in characters:
        if character == '"':
            quoted = not quoted
            kept = len(value)
            continue
        if character in "#;" and not quoted:
            break
        if character == "\\":
            escaped = next(characters, "")
            value += _ESCAPES.get(escaped, escaped)
        else:
            value += character
        if quoted or not character.isspace():
            kept = len(value)
    return value[:kept]


def _first_line(file: str) -> str:
    return next(iter(_text(file).splitlines()), "")


def _text(file: str) -> str:
    try:
        return os.fsdecode(read_start(file, _MOST_BYTES, follow_link=True))
    except (OSError, PatternFileError):
        return ""  # git would refuse, too; our rules are the best that there is
