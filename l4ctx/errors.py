"""Exit codes, and the errors that a user can cause. Imports no torch.

An error class says its exit code itself. Those that one module alone raises are beside it, and derive from one of these
or from `UserError`; those of `model` and `cache` are in the `errors.py` there.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from model.errors import UserError

OUTPUT, INPUT, CHECKPOINT, TOO_LONG, MEMORY, MODEL, CONTEXT, INTERRUPTED, CLOSED = 1, 2, 3, 4, 5, 6, 7, 130, 141
CODES_OF_ERRORS = frozenset((OUTPUT, INPUT, CHECKPOINT, TOO_LONG, MEMORY, MODEL, CONTEXT))


class OutputError(UserError):
    """An answer that cannot be written, as on a full disk."""

    exit_code = OUTPUT


class InputError(UserError):
    """What was asked for, or given to be read, cannot be used."""

    exit_code = INPUT


class UsageError(InputError):
    """Arguments that do not go together."""


class RequestError(InputError):
    """A request that cannot be carried out: a device that this machine lacks, standard input without text."""


class UnusableCheckpointError(UserError):
    """A file that lies beside a checkpoint's weights, and that is missing, broken or cannot be followed."""

    exit_code = CHECKPOINT


class ModelFailureError(UserError):
    """A model, or a process that runs one, that failed at its work."""

    exit_code = MODEL


class ContextError(UserError):
    """A saved context that cannot be used or changed; the message names it, the reason and how to fix it."""

    exit_code = CONTEXT


class LimitError(UserError):
    """A limit of the system that is too low to begin with."""

    exit_code = MEMORY


REMEDIES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "the quota there is used up: free some space",
    errno.EFBIG: "files may not be so large: raise the limit (ulimit -f), or name a folder on another disk",
    errno.ENOMEM: "free some memory, or raise its limit (ulimit -v)",
    errno.EMFILE: "raise the limit, as with ulimit -n 1024",
    errno.ENFILE: "the whole system has too many; end other programs",
    errno.EAGAIN: "a limit of processes and threads: raise it (ulimit -u), or end other programs",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.EROFS: "name a folder that can be written",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "links that lead round in a circle: name the file itself",
    errno.EIO: "the disk or the network failed: try again, or use a copy elsewhere",
    errno.ESTALE: "the network's file system has changed: try again",
    errno.ETIMEDOUT: "the network does not answer: try again",
}
"""What to do about errors of the system, after its own words."""

SHORTAGES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN})
"""Errors that say that memory, disk space or another resource is used up."""

_NO_MEMORY = re.compile(
    r"(?:can(?:not|'t)|unable to|failed to) (?:allocate|mmap|map segment)|not enough memory|out of memory"
    r"|bad_alloc|memory allocation|Allocation(?: of .*)? failed|ENOMEM",
    re.IGNORECASE,
)
_NO_THREAD = re.compile(
    r"can't start new thread|Resource temporarily unavailable|pthread_create|ThreadPoolBuildError", re.IGNORECASE
)
_NO_FILES = re.compile("Too many open files|Unable to open /dev/urandom", re.IGNORECASE)
_BY_NUMBER = re.compile(r"\(os error (\d+)\)|\bcode: (\d+), kind: ")  # as Rust's libraries say it
_TEXT_ALONE = ("RuntimeError", "ImportError", "SystemError", "Exception", "SafetensorError", "PanicException")
"""Types of error by which libraries report what the system refused, in words alone."""


def exit_code_of(error: BaseException, owners: Mapping[Path, int] | None = None) -> int | None:
    """The exit code of what a user or the system can cause; None for anything else, which is a bug.

    An OSError has that of the folder in `owners` that its file is in, or else INPUT. Where a resource is used up, it
    has MEMORY, and so has a UserError that was raised for it, unless the answer could not be written.
    """
    if isinstance(error, UserError):
        return error.exit_code if _shortage_behind(error) is None else MEMORY
    if _has_null(error):
        return INPUT
    number = _errno_of(error)
    if number is None:
        return None
    if number in SHORTAGES:
        return MEMORY
    file = _file_of(error) if isinstance(error, OSError) else None
    if file is not None:
        for folder, code in (owners or {}).items():
            if Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
                return code
    return INPUT


def one_line(error: BaseException) -> str:
    """What an error says and, for one of the system, the file and what to do."""
    text = " ".join(str(error).splitlines())
    if isinstance(error, UserError):
        advice = REMEDIES.get(_shortage_behind(error) or 0, "")
        return text if not advice or advice in text or "free some space" in text else f"{text}; {advice}"
    if _has_null(error):
        return "the name of a file holds a NUL character, which no file can have"
    number = _errno_of(error)
    if isinstance(error, OSError):
        file, file_to = _file_of(error), error.filename2
        where = f"{file}{f' (to {os.fsdecode(file_to)})' if isinstance(file_to, str | bytes) else ''}: " if file else ""
        remedy = REMEDIES.get(error.errno or 0)
        return f"{where}{error.strerror or text or type(error).__name__}{f'; {remedy}' if remedy else ''}"
    if number == errno.ENOMEM:
        if "CUDA" in text or "HIP" in text:  # memory of the accelerator
            return text
        said = f" ({text})" if text else ""
        return f"out of memory{said}; {REMEDIES[errno.ENOMEM]}"
    return f"{os.strerror(number)} ({text}); {REMEDIES[number]}" if number in REMEDIES else text


def _shortage_behind(error: UserError) -> int | None:
    """The system's number of the shortage that an error was raised for. `from None` hides it from tracebacks alone.

    EAGAIN is none here: it is also what a lock says that another process holds.
    """
    behind = error.__context__ if error.exit_code != OUTPUT else None
    while behind is not None:
        if (number := _errno_of(behind)) in SHORTAGES - {errno.EAGAIN}:
            return number
        behind = behind.__context__
    return None


def _errno_of(error: BaseException) -> int | None:
    """The system's number of what went wrong, if the system caused it: 0 where it gives none."""
    if isinstance(error, OSError):
        return error.errno or 0
    torch = sys.modules.get("torch")  # where nothing has imported it, none of its errors was raised
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return errno.ENOMEM
    if type(error).__name__ not in _TEXT_ALONE:
        return None
    text = str(error)
    if (found := _BY_NUMBER.search(text)) is not None:
        return int(found[1] or found[2])
    kinds = ((_NO_MEMORY, errno.ENOMEM), (_NO_THREAD, errno.EAGAIN), (_NO_FILES, errno.EMFILE))
    return next((number for pattern, number in kinds if pattern.search(text)), None)


def _has_null(error: BaseException) -> bool:
    """Whether a name was refused that the system could not have been given."""
    return isinstance(error, ValueError) and str(error).startswith("embedded null")


def _file_of(error: OSError) -> str | None:
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) and error.filename else None
