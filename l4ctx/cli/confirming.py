"""Asks a person before something is deleted."""

from __future__ import annotations

import sys

from l4ctx.errors import UsageError
from l4ctx.formatting import as_one_line


def confirmed(question: str) -> bool:
    """Whether a person says yes on the terminal. Raises UsageError where there is none to ask."""
    if sys.stdin is None or not sys.stdin.isatty() or not sys.stderr.isatty():
        raise UsageError(f"{question} Nobody is there to be asked: add --yes")
    sys.stderr.write(f"l4ctx: {as_one_line(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().casefold() in ("y", "yes")
