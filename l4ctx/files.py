"""Bytes of a file as it is now, without ever waiting for a pipe; and names that are safe to show.

What the bytes are is left to others.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from io import FileIO

SAMPLE_BYTES = 1 << 16  # how much of a file is read to tell what it is


def kind(mode: int) -> str:
    """What is neither a file nor a folder, in words."""
    return {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device or folder")


def read_regular_file(path: str, check: Callable[[bytes, int], None] | None = None) -> tuple[bytes, bool]:
    """The bytes of a file, and whether it changed meanwhile. Never waits for a pipe put in the file's place.

    `check` is told the first SAMPLE_BYTES and the size in bytes before the rest is read, which it prevents by an
    exception.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise OSError(0, f"became a {kind(before.st_mode)}")
        if check is not None:
            check(_sample(file), before.st_size)
            file.seek(0)
        raw = file.readall()
        after = os.fstat(file.fileno())
    changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
    if not changed and len(raw) < before.st_size:
        raise OSError(errno.EIO, f"only {len(raw):,} of its {before.st_size:,} bytes came")
    return raw, changed


def _sample(file: FileIO) -> bytes:
    """The first bytes; a file system may return fewer at once than were asked for."""
    sample = b""
    while len(sample) < SAMPLE_BYTES and (more := file.read(SAMPLE_BYTES - len(sample))):
        sample += more
    return sample
