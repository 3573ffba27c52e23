"""Deletes a saved context: what belongs to one, and nothing else. Imports no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from l4ctx.contexts.folder import BLOCKS, FILE, HEAD, JOURNAL, READERS_LOCK, WRITER_LOCK, is_context
from l4ctx.contexts.locks import deletion_lock, writer_lock
from l4ctx.contexts.states import is_ours, is_temporary
from l4ctx.errors import ContextError


class Removed(NamedTuple):
    files: int
    bytes: int
    is_folder_gone: bool  # False: it holds files that are not the context's


def check_removable(folder: Path) -> None:
    """Raises ContextError for what is no saved context, and for a link to one."""
    if folder.is_symlink():
        raise ContextError(f"{folder}: a symbolic link; name the folder itself")
    if not is_context(folder):
        what = "not a saved context" if os.path.lexists(folder) else "no such folder"
        raise ContextError(f"{folder}: {what}; nothing was deleted")


def remove_context(folder: Path) -> Removed:
    """Deletes the context's files, the manifest last, so that after an interruption it can be deleted again.

    Names are those of the folder itself, never of what a link in it leads to. Raises ContextError where another process
    writes to it or reads it, and OSError.
    """
    check_removable(folder)
    writer = writer_lock(folder)
    try:
        readers = deletion_lock(folder)
        if readers is None and (folder / BLOCKS).is_dir():
            raise ContextError(f"{folder}: another process is reading it, or it cannot be locked; nothing was deleted")
        try:
            return _removed(folder)
        finally:
            if readers is not None:
                readers.close()
    finally:
        writer.close()


def _removed(folder: Path) -> Removed:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    top = os.open(folder, flags)
    files = count = 0
    try:
        with suppress(FileNotFoundError):
            inner = os.open(BLOCKS, flags, dir_fd=top)
            try:
                for name in os.listdir(inner):
                    if is_ours(f"{BLOCKS}/{name}") or is_temporary(f"{BLOCKS}/{name}"):
                        files, count = files + 1, count + _unlinked(name, inner)
            finally:
                os.close(inner)
            with suppress(OSError):  # other files are in it
                os.rmdir(BLOCKS, dir_fd=top)
        names = [name for name in os.listdir(top) if is_ours(name) or is_temporary(name)]
        for name in (*names, JOURNAL, HEAD, READERS_LOCK, WRITER_LOCK, FILE):
            with suppress(FileNotFoundError):
                files, count = files + 1, count + _unlinked(name, top)
        is_empty = not os.listdir(top)
    finally:
        os.close(top)
    if is_empty:
        os.rmdir(folder.absolute())
    return Removed(files, count, is_empty)


def _unlinked(name: str, folder: int) -> int:
    """Its bytes, which are free now unless other names have the same file."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    os.unlink(name, dir_fd=folder)
    return status.st_size if status.st_nlink == 1 else 0
