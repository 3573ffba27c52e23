"""Reading regular files without ever blocking on a pipe, and writing files durably and atomically."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from l4ctx.machine.private import FOLDER_MODE, open_private, temporary_of
from model.folder import check_whole, open_regular

SAMPLE_BYTES = 1 << 16  # how much of a file is read to recognise its type


def read_regular_file(path: str, check: Callable[[bytes, int], None] | None = None) -> tuple[bytes, bool]:
    """The bytes of a file that was just seen, and whether it changed while being read. Never blocks on a pipe.

    `check` gets the first SAMPLE_BYTES and the size in bytes before the rest is read; it can raise to prevent that.
    Raises OSError.
    """
    with open_regular(path, is_seen=True) as file:
        before = os.fstat(file.fileno())
        raw = _sample(file, before.st_size)
        if check is not None:
            check(raw, before.st_size)
        if len(raw) == SAMPLE_BYTES:
            file.seek(0)
            raw = file.readall()
        after = os.fstat(file.fileno())
    changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
    if not changed:
        check_whole(path, len(raw), before.st_size)
    return raw, changed


def _sample(file: FileIO, size: int) -> bytes:
    """The first SAMPLE_BYTES, or all of a smaller file; a single read may return fewer bytes than requested."""
    sample, most = b"", min(SAMPLE_BYTES, max(size + 1, 1 << 12))
    while len(sample) < SAMPLE_BYTES and (more := file.read(min(most, SAMPLE_BYTES - len(sample)))):
        sample += more
    return sample


def open_named(path: str | Path) -> BinaryIO:
    """A regular file or a pipe that the user named, such as the shell's <(command), which is waited for.

    Raises OSError, also for folders and devices.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise OSError(errno.EINVAL, "neither a file nor a pipe", str(path))
    return open(path, "rb")


def write_atomically(file: Path, text: str) -> None:
    """Atomically replaces a small file, readable by its owner only, and makes it durable. Raises OSError."""
    os.close(replace_file(file, text.encode("utf-8"), os.O_WRONLY))
    sync_folder(file.parent)


def replace_file(file: Path, content: bytes, flags: int) -> int:
    """Atomically replaces a file by one readable by its owner only; returns its descriptor, opened with `flags`.

    The content is durable; the name is only after `sync_folder`. On OSError nothing has changed.
    """
    temporary = temporary_of(file)
    descriptor = open_private(temporary, flags | os.O_CREAT | os.O_EXCL)
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(content)
        os.fsync(descriptor)
        os.replace(temporary, file)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        raise
    return descriptor


def sync_folder(folder: Path, *, is_required: bool = False) -> None:
    """Makes the names of new files in a folder durable, where the system supports it (Windows does not).

    Raises OSError if the folder cannot be opened, and with `is_required` also if syncing fails.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:
        if is_required:
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates the folder with FOLDER_MODE if it does not exist, and its parents as usual; their names are durable then.

    Raises OSError.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    if stat.S_IMODE(folder.stat().st_mode) & FOLDER_MODE != FOLDER_MODE:
        folder.chmod(FOLDER_MODE)
    sync_names(missing)


def sync_names(paths: Sequence[Path]) -> None:
    """Makes the names of new files or folders durable, where their folders may be read."""
    for folder in {path.parent for path in paths}:
        with suppress(OSError):
            sync_folder(folder)
