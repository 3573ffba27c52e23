"""The entries of a folder, in a deterministic order, and which of them are left out unopened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from l4ctx.contexts.folder import is_context
from l4ctx.documents.exclusion.rules import Rules
from l4ctx.formatting import printable


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a folder that is still to be read."""

    path: str  # as it was reached, by links perhaps
    own: str  # without links on the way to it
    real: str  # where it leads: `own`, if it is no link
    source: str
    rules: Rules | None  # of the folder that it is in
    status: os.stat_result | OSError  # of what a link leads to
    is_link: bool

    @property
    def is_folder(self) -> bool:
        return not isinstance(self.status, OSError) and stat.S_ISDIR(self.status.st_mode)


class Level:
    """A folder that is being walked: its entries in the order of their paths' bytes, each looked at when it is due.

    Of those to come there is nothing but the names, so that a folder of a million files is no burden.
    """

    def __init__(self, path: str, real: str, source: str) -> None:
        """Lists the folder. Raises OSError."""
        self.rules: Rules | None = None
        self._path, self._real = os.path.join(path, ""), os.path.join(real, "")
        self._source = f"{source}/" if source else ""
        self._links: set[bytes] = set()
        with os.scandir(path) as scan:
            self._keys = [self._key(found) for found in scan]  # the name, and a slash if it is a folder's
        self._keys.sort(reverse=True)

    def entries(self) -> Iterator[Entry]:
        """Each one is gone when the next one is asked for."""
        while self._keys:
            yield self._entry(self._keys.pop())

    def _key(self, found: os.DirEntry[str]) -> bytes:
        key = os.fsencode(found.name)
        try:
            is_folder = found.is_dir()
        except OSError:  # of what a link leads to; the look at the entry itself finds it again
            is_folder = False
        if is_folder:
            key += b"/"
        if found.is_symlink():
            self._links.add(key)
        return key

    def _entry(self, key: bytes) -> Entry:
        name = os.fsdecode(key.removesuffix(b"/"))
        path, own = self._path + name, self._real + name
        status: os.stat_result | OSError
        try:
            status = os.stat(path)
        except OSError as error:
            status = error
        real, is_link = own, key in self._links
        if is_link:
            try:
                real = os.path.realpath(own, strict=True)
            except OSError as error:
                real = os.path.realpath(own)
                status = status if isinstance(status, OSError) else error
        return Entry(path, own, real, f"{self._source}{printable(name)}", self.rules, status, is_link)


def folder_source(path: str) -> str:
    """The name of a folder argument: its last component; of the current folder, none."""
    name = os.path.basename(os.path.normpath(path))
    return printable({os.curdir: "", os.pardir: os.path.basename(os.path.abspath(path))}.get(name, name))


def reason_to_leave_out(entry: Entry, root: str) -> str | None:
    """Why an entry of the folder `root` is not even opened, if so."""
    if os.path.basename(entry.path).startswith("."):
        return "hidden"
    if entry.is_folder and is_context(entry.path):
        return "a saved context"
    if entry.rules and (reason := entry.rules.reason(entry.own, is_folder=entry.is_folder and not entry.is_link)):
        return reason
    if not entry.is_link:
        return None
    if isinstance(entry.status, OSError) and entry.status.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return "a symbolic link that leads nowhere"
    if entry.is_folder and (os.path.dirname(entry.own) + os.sep).startswith(os.path.join(entry.real, "")):
        return "a symbolic link to a folder that it lies in (a loop)"
    if not entry.real.startswith(os.path.join(root, "")):
        return "a symbolic link that leaves the folder"
    if any(part.startswith(".") for part in os.path.relpath(entry.real, root).split(os.sep)):
        return "a symbolic link to something hidden"
    return None
