"""Locks on a saved context: one writer at a time, and old blocks are deleted only while nobody reads.

Each lock is taken on a folder and on a file made for it. Copies by hard links (cp -al) share the file, but not the
folder: where the file has several names, the folder's lock alone counts.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from l4ctx.contexts.folder import BLOCKS, READERS_LOCK, WRITER_LOCK
from l4ctx.errors import ContextError
from l4ctx.machine.private import open_private

READERS_WAIT = 5.0
"""Seconds that a reader waits: a writer holds the readers' lock only to delete files."""

WRITERS_WAIT = 0.2
"""Seconds that a writer waits: `is_being_written` holds the lock for a moment."""

_PAUSE = 0.02


class Lock:
    """Held until it is closed."""

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors = descriptors

    def close(self) -> None:
        """A second call does nothing."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def writer_lock(folder: Path) -> Lock:
    """Raises ContextError when another process is writing to the context; OSError where it cannot be locked."""
    try:
        return _waited_for(folder / WRITER_LOCK, folder, WRITERS_WAIT, exclusive=True, create=True)
    except BlockingIOError:
        raise ContextError(
            f"{folder}: another process is writing to it; wait for it to finish, or name another folder"
        ) from None


def is_being_written(folder: Path) -> bool:
    """Whether a writer holds its lock."""
    try:
        _taken(folder / WRITER_LOCK, folder, exclusive=False).close()
    except BlockingIOError:
        return True
    except OSError:
        return False  # a writer needs the lock, which cannot be taken here
    return False


def readers_lock(folder: Path, waiting: Callable[[str], None] | None = None) -> Lock | None:
    """Keeps files from being deleted until it is closed; None where it cannot be taken, as in a read-only copy.

    `waiting` is called when another process holds the lock. Raises ContextError when that lasts.
    """
    file = folder / READERS_LOCK
    try:
        return _waited_for(file, folder / BLOCKS, READERS_WAIT, exclusive=False, waiting=waiting)
    except BlockingIOError:
        raise ContextError(
            f"{file}: another process has held this lock for {READERS_WAIT:.0f} seconds, so that the "
            "context cannot be read; end that process (fuser names it), or try again"
        ) from None
    except OSError:
        return None


def make_readers_lock(folder: Path) -> None:
    """Makes the file that readers lock. Raises OSError."""
    with suppress(FileExistsError):  # an existing context, or a process that died right after
        os.close(open_private(folder / READERS_LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL))


def deletion_lock(folder: Path) -> Lock | None:
    """Keeps readers out while files are deleted; None when there is a reader, or it cannot be taken."""
    try:
        return _taken(folder / READERS_LOCK, folder / BLOCKS, exclusive=True)
    except OSError:
        return None


def _waited_for(
    file: Path,
    folder: Path,
    seconds: float,
    *,
    exclusive: bool,
    create: bool = False,
    waiting: Callable[[str], None] | None = None,
) -> Lock:
    began = time.monotonic()
    while True:
        try:
            return _taken(file, folder, exclusive=exclusive, create=create)
        except BlockingIOError:
            waited = time.monotonic() - began
            if waited >= seconds:
                raise
        if waiting is not None and waited > 0.5:
            waiting(f"{file}: another process has locked it; waiting for {seconds:.0f} seconds at most")
            waiting = None
        time.sleep(_PAUSE)


def _taken(file: Path, folder: Path, *, exclusive: bool, create: bool = False) -> Lock:
    """Raises BlockingIOError when another process holds it, and OSError where neither folder nor file can be locked,
    or the file cannot be created."""
    import fcntl

    held, why = Lock([]), OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    try:
        for path in (folder, file):
            try:
                descriptor = _opened_file(file, create=create) if path is file else _opened_folder(folder, file)
            except OSError as error:
                if create:
                    raise
                why = error
                continue
            held._descriptors.append(descriptor)
            if path is file and os.fstat(descriptor).st_nlink > 1:  # shared with a copy
                os.close(held._descriptors.pop())
                continue
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError as error:  # NFS locks no folders
                why = error
                os.close(held._descriptors.pop())
        if not held._descriptors:
            raise why
    except BaseException:
        held.close()
        raise
    return held


def _opened_folder(folder: Path, file: Path) -> int:
    """The context's own folder may be reached through a symbolic link; one inside it may not."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return os.open(folder, flags if folder == file.parent else flags | os.O_NOFOLLOW)


def _opened_file(file: Path, *, create: bool) -> int:
    if not create:
        return open_private(file, os.O_RDONLY)
    try:
        return open_private(file, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return open_private(file, os.O_RDWR)  # NFS requires write access for an exclusive lock
