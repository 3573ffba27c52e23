"""Suggests an existing path similar to a missing one. Only looks at names."""

from __future__ import annotations

import itertools
import os

from l4ctx.formatting import printable

COMPARED_NAMES = 2000  # most entries of a folder that are compared


def is_missing(path: str) -> bool:
    """Whether the path certainly does not exist; an inaccessible one may exist."""
    if path in ("", "-"):
        return False
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        pass
    return False


def closest(path: str) -> str | None:
    """An existing path that is close to `path`: each missing part differs only in case or in a few letters."""
    here = "/" if path.startswith("/") else ""
    for part in filter(None, path.split("/")):
        there = os.path.join(here, part)
        if is_missing(there):
            name = _closest_name(here or ".", part)
            if name is None:
                return None
            there = os.path.join(here, name)
        here = there
    return here + "/" * (path.endswith("/") and os.path.isdir(here))


def did_you_mean(path: str) -> str:
    """The end of a message about a missing path; empty if no existing path is similar."""
    meant = closest(path)
    return "" if meant is None else f"; did you mean {printable(meant)}?"


def _closest_name(folder: str, name: str) -> str | None:
    import difflib

    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, COMPARED_NAMES)]
    except OSError:
        return None
    names = sorted(other for other in names if other.startswith(".") == name.startswith("."))
    by_case = [other for other in names if other.casefold() == name.casefold()]
    return next(iter(by_case or difflib.get_close_matches(name, names, n=1)), None)
