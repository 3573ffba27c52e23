"""The data files of a saved context: written once under a random name, synced, and deleted when no state needs them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path

from cache.disk import Units, write_units
from l4ctx.contexts.folder import BLOCKS, FILE, HEAD, JOURNAL, READERS_LOCK, WRITER_LOCK
from l4ctx.contexts.locks import deletion_lock
from l4ctx.contexts.states import Stored, is_ours, is_temporary
from l4ctx.machine.files import sync_folder
from l4ctx.machine.private import narrow, open_private


def write_file(folder: Path, prefix: str, units: Units, metadata: Mapping[str, str]) -> Stored:
    """Writes a file whose name is new and begins with `prefix`; it is not durable before `sync_file`.

    Raises OSError, and leaves no file then.
    """
    name = f"{prefix}-{secrets.token_hex(6)}.safetensors"
    path = folder / name
    descriptor = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        header_sha256, _ = write_units(descriptor, units, metadata)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return Stored(name, header_sha256)


def sync_file(folder: Path, stored: Stored) -> None:
    """Makes the file's content durable, then its name. Raises OSError."""
    path = folder / stored.name
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def delete_unused(folder: Path, needed: Collection[str]) -> None:
    """Deletes the context's own files that are not `needed`, unless it is being read."""
    lock = deletion_lock(folder)
    if lock is None:
        return
    try:
        for path in (*folder.iterdir(), *(folder / BLOCKS).iterdir()):
            name = path.relative_to(folder).as_posix()
            if (is_ours(name) or is_temporary(name)) and name not in needed:
                path.unlink(missing_ok=True)
    except OSError:
        pass  # a file that stays takes space, and no state names it
    finally:
        lock.close()


def make_private(folder: Path) -> list[str]:
    """Revokes others' permissions on everything that the context's text can be decoded from. Returns notes for the user
    where there were any, or where that fails."""
    ours = {FILE, HEAD, JOURNAL, WRITER_LOCK, READERS_LOCK, BLOCKS}
    try:
        was_open = narrow(folder, follow=True)
        for path in (*folder.iterdir(), *(folder / BLOCKS).iterdir()):
            name = path.relative_to(folder).as_posix()
            if name in ours or is_ours(name) or is_temporary(name):
                was_open |= narrow(path)
    except OSError as error:
        return [f"{folder}: others may read it, and that cannot be changed: {error.strerror}"]
    return (
        [f"{folder}: others could read it; now only you can (its text can be decoded from what it holds)"]
        if was_open
        else []
    )
