"""Which path may have been meant, where one is not there. Only looks at names."""

from __future__ import annotations

import itertools
import os

from l4ctx.formatting import printable

COMPARED_NAMES = 2000  # of a folder


def is_missing(path: str) -> bool:
    """Whether there is nothing of that name; what cannot be looked at may be there."""
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
    """A path that is there and differs little: in each part that is missing, by case or by a few letters."""
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
    """For the end of a message about a path that is not there; empty where nothing is like it."""
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
