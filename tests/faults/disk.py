"""What a power loss leaves on a disk: the changes of a run, and those of them that were not synced lost in part.

The model is that of POSIX, which promises less than any file system does. A file's content is on the disk once the
file was synced, a name once its folder was. What came later may be there or not, each change by itself: a write whole,
in part, as zeros, or not at all; a name new, old or gone. Only a rename within a folder is atomic.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECTORS = (1, 512, 4096)


@dataclass(frozen=True)
class Change:
    """One line of the shim's log: what was done to which file (an inode's number and a path)."""

    what: str
    inode: int
    offset: int
    path: str
    other: str = ""  # a rename's or link's new path
    content: bytes = b""


def read_log(file: Path, top: Path) -> list[Change]:
    """The changes below `top`, with paths relative to it."""
    data, found, place = file.read_bytes(), [], 0
    while place < len(data):
        end = data.index(b"\n", place)
        what, inode, offset, length, *paths = data[place:end].decode().split("\t")
        place = end + 1 + int(length)
        names = [Path(path) for path in paths]
        if all(name.is_relative_to(top) for name in names):
            first, *others = [name.relative_to(top).as_posix() for name in names]
            found.append(Change(what, int(inode), int(offset), first, "".join(others), data[end + 1 : place]))
    return found


@dataclass
class _File:
    content: bytearray = field(default_factory=bytearray)  # on the disk
    later: list[tuple[int, Change]] = field(default_factory=list)  # since the last sync, with their numbers


@dataclass
class _Folder:
    names: dict[str, _File | _Folder] = field(default_factory=dict)
    later: list[tuple[int, Callable[[dict[str, _File | _Folder]], None]]] = field(default_factory=list)


@dataclass(frozen=True)
class Loss:
    """Which of the changes that were not synced are kept: called with a change's number; and how writes are torn."""

    keeps_data: Callable[[int], bool]
    keeps_name: Callable[[int], bool]
    tear: Callable[[bytes], bytes] = bytes


class Disk:
    """The disk of one cut: a folder as it was, and changes."""

    def __init__(self, start: Path) -> None:
        self._top = _Folder()
        self._live: dict[str, _File | _Folder] = {".": self._top}  # by path, as the running system sees it
        self._by_inode: dict[int, _File] = {}
        for path in sorted(start.rglob("*")):
            node = _Folder() if path.is_dir() else _File(bytearray(path.read_bytes()))
            name = path.relative_to(start)
            self._live[name.as_posix()] = node
            self._folder(name.as_posix()).names[name.name] = node

    def apply(self, number: int, change: Change) -> None:
        path, name = change.path, Path(change.path).name
        if change.what in ("create", "mkdir"):
            node: _File | _Folder = _File() if change.what == "create" else _Folder()
            self._live[path] = node
            if isinstance(node, _File):
                self._by_inode[change.inode] = node
            self._folder(path).later.append((number, lambda names: names.update({name: node})))
        elif change.what in ("write", "truncate"):
            self._file(change).later.append((number, change))
        elif change.what == "sync":
            self._sync(change)
        elif change.what == "unlink":
            self._live.pop(path, None)
            self._folder(path).later.append((number, lambda names: names.pop(name, None)))
        elif change.what in ("rename", "link"):
            self._name(number, change)

    def after(self, loss: Loss) -> dict[str, bytes | None]:
        """The content of each file by its path; None for a folder."""
        found: dict[str, bytes | None] = {}

        def visit(folder: _Folder, path: str) -> None:
            names = dict(folder.names)
            for number, act in folder.later:
                if loss.keeps_name(number):
                    act(names)
            for name, node in sorted(names.items()):
                below = f"{path}{name}"
                found[below] = None if isinstance(node, _Folder) else _content(node, loss)
                if isinstance(node, _Folder):
                    visit(node, f"{below}/")

        visit(self._top, "")
        return found

    def _folder(self, path: str) -> _Folder:
        found = self._live[Path(path).parent.as_posix()]
        assert isinstance(found, _Folder), path
        return found

    def _file(self, change: Change) -> _File:
        node = self._by_inode.get(change.inode) or self._live[change.path]
        assert isinstance(node, _File), change.path
        return self._by_inode.setdefault(change.inode, node)

    def _sync(self, change: Change) -> None:
        node = self._live.get(change.path)
        if isinstance(node, _Folder):
            for _, act in node.later:
                act(node.names)
            node.later.clear()
            return
        file = self._file(change)
        file.content = bytearray(_content(file, ALL))
        file.later.clear()

    def _name(self, number: int, change: Change) -> None:
        old, new = Path(change.path), Path(change.other)
        node = self._live[change.path]
        is_moved = change.what == "rename"

        def act(names: dict[str, _File | _Folder]) -> None:
            if is_moved and old.parent == new.parent:
                names.pop(old.name, None)
            names[new.name] = node

        self._folder(change.other).later.append((number, act))
        self._live[change.other] = node
        if is_moved:
            del self._live[change.path]
            if old.parent != new.parent:
                self._folder(change.path).later.append((number, lambda names: names.pop(old.name, None)))


def _content(file: _File, loss: Loss) -> bytes:
    content = bytearray(file.content)
    for number, change in file.later:
        if not loss.keeps_data(number):
            continue
        if change.what == "truncate":
            del content[change.offset :]
            content.extend(bytes(change.offset - len(content)))
        else:
            written = loss.tear(change.content)
            content.extend(bytes(max(0, change.offset + len(written) - len(content))))
            content[change.offset : change.offset + len(written)] = written
    return bytes(content)


ALL = Loss(lambda number: True, lambda number: True)


def losses(chance: random.Random, cut: int) -> Loss:
    """One of the ways to lose what was not synced before change number `cut`."""
    share, at = chance.choice((0.2, 0.5, 0.8)), chance.randint(0, cut)
    kept: dict[tuple[str, int], bool] = {}

    def by_chance(what: str) -> Callable[[int], bool]:
        return lambda number: kept.setdefault((what, number), chance.random() < share)

    def always(number: int) -> bool:
        return True

    def never(number: int) -> bool:
        return False

    def before(number: int) -> bool:
        return number < at

    ways = [
        Loss(always, always),  # the process died, nothing else
        Loss(never, never),
        Loss(never, always),  # names without their content
        Loss(always, never),
        Loss(always, always, lambda content: bytes(len(content))),  # lengths without content
        Loss(before, before),  # in order
        Loss(before, before, lambda content: _torn(chance, content)),
        Loss(by_chance("data"), by_chance("name")),
        Loss(by_chance("data"), by_chance("name"), lambda content: _torn(chance, content)),
        Loss(by_chance("data"), always, lambda content: _torn(chance, content)),
    ]
    return chance.choice(ways)


def _torn(chance: random.Random, content: bytes) -> bytes:
    """A beginning of what was written, or some of its sectors, with zeros for the others."""
    size = chance.choice(SECTORS)
    if size == 1 or chance.random() < 0.5:
        return content[: chance.randint(0, len(content)) // size * size]
    sectors = [content[n : n + size] for n in range(0, len(content), size)]
    return b"".join(sector if chance.random() < 0.5 else bytes(len(sector)) for sector in sectors)
