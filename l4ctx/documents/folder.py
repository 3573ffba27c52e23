"""The entries of a folder, in a deterministic order, and which of them are left out unopened."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from l4ctx.contexts.folder import is_context
from l4ctx.documents.exclusion.rules import Rules
from l4ctx.formatting import printable


@dataclass(frozen=True)
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


def folder_source(path: str) -> str:
    """The name of a folder argument: its last component; of the current folder, none."""
    name = os.path.basename(os.path.normpath(path))
    return printable({os.curdir: "", os.pardir: os.path.basename(os.path.abspath(path))}.get(name, name))


def entries_of(path: str, real: str, source: str, rules: Rules | None) -> list[Entry]:
    """The entries of a folder, last one first: to be popped in the order of their paths' bytes."""
    with os.scandir(path) as scan:
        found = list(scan)
    entries = []
    for each in found:
        is_link = each.is_symlink()
        status: os.stat_result | OSError
        try:
            status = os.stat(each.path)
        except OSError as error:
            status = error
        own = os.path.join(real, each.name)
        entry = Entry(
            each.path,
            own,
            os.path.realpath(own) if is_link else own,
            f"{source}/{printable(each.name)}".lstrip("/"),
            rules,
            status,
            is_link,
        )
        entries.append((os.fsencode(each.name) + b"/" * entry.is_folder, entry))
    return [entry for _, entry in sorted(entries, key=lambda pair: pair[0], reverse=True)]


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
