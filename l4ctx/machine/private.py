"""Files and folders that only their owner may read, whatever the umask, as in saved contexts."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

FILE_MODE, FOLDER_MODE = 0o600, 0o700
OTHERS = 0o077
"""Permission bits of group and others."""


def open_private(path: Path, flags: int) -> int:
    """Opens a file, creating it with FILE_MODE, and returns the descriptor. Follows no links. Raises OSError."""
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_BINARY"):  # a pipe in its place must not block
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, FILE_MODE)
    if flags & os.O_EXCL and stat.S_IMODE(os.fstat(descriptor).st_mode) != FILE_MODE and hasattr(os, "fchmod"):
        with suppress(PermissionError):  # a file system without modes, which `narrow` detects and reports
            os.fchmod(descriptor, FILE_MODE)  # the umask removed even the owner's permissions
    return descriptor


def temporary_of(file: Path) -> Path:
    """An unpredictable name beside `file`, in the form that `l4ctx.contexts.states.is_temporary` recognises."""
    return file.with_name(f".{file.name}.{os.urandom(8).hex()}")


def is_open_to_others(path: Path) -> bool:
    """Whether anyone but the owner has permissions; links are not followed. Raises OSError."""
    mode = path.lstat().st_mode
    return not stat.S_ISLNK(mode) and bool(mode & OTHERS)


def narrow(path: Path, *, follow: bool = False) -> bool:
    """Removes everyone else's permissions on a file or folder; returns whether there were any. Raises OSError.

    A file with several hard links is left unchanged, since the other names are not ours.
    """
    if not follow and not is_open_to_others(path):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        status = os.fstat(descriptor)
        is_ours = stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
        if not is_ours or not status.st_mode & OTHERS:
            return False
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & ~OTHERS)
        return True
    finally:
        os.close(descriptor)
