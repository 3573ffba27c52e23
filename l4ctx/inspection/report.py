"""The report on a folder: a plain dict that damage is added to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from l4ctx.errors import MEMORY, exit_code_of, one_line

T = TypeVar("T")
P = ParamSpec("P")
Report = dict[str, Any]


def add_damage(report: Report, file: Path, what: str) -> None:
    report["damage"].append({"file": str(file), "what": f"{file}: {what}"})


def attempt(report: Report, file: Path, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Returns the result of `work`, or None after adding damage: untrusted files can be broken in any way.

    Memory or open files that run out say nothing about the file, and are raised.
    """
    try:
        return work(*args, **kwargs)
    except Exception as error:  # the readers' own errors, and anything else that a broken file makes them raise
        code = exit_code_of(error)
        if code == MEMORY:
            raise
        if isinstance(error, OSError):
            what = one_line(error) if error.filename else f"{file}: {one_line(error)}"
            report["damage"].append({"file": str(file), "what": what})
        elif code is not None and str(error):
            report["damage"].append({"file": str(file), "what": str(error)})
        else:
            add_damage(report, file, f"cannot be used ({type(error).__name__}: {error})")
        return None
