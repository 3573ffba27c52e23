"""Which contexts and models this program has worked with: their paths and when, for `l4ctx list`."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from l4ctx.machine.places import state_folder
from l4ctx.machine.private import FOLDER_MODE, narrow, open_private

MOST_ENTRIES = 500
"""Of each kind: those that were not used for longest are forgotten."""

LARGEST_FILE = 2**22
CONTEXTS, MODELS = "contexts", "models"


class Seen:
    """Paths with the time of their last use, in seconds since 1970, by kind."""

    def __init__(self, folder: Path | None = None) -> None:
        self.file = (folder or state_folder()) / "seen.json"

    def entries(self, kind: str) -> dict[str, float]:
        """The newest first; nothing where the file is not there or damaged."""
        try:
            with os.fdopen(open_private(self.file, os.O_RDONLY), "rb") as stream:
                return _entries(stream.read(LARGEST_FILE), kind)
        except OSError:
            return {}

    def add(self, kind: str, path: Path) -> None:
        """Raises OSError."""
        with self._changing() as content:
            content[kind][str(path.absolute())] = time.time()

    def forget(self, kind: str, path: Path) -> None:
        """Raises OSError."""
        with self._changing() as content:
            content[kind].pop(str(path.absolute()), None)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, float]]]:
        """The whole content, written back in place under a lock: it is short, and damage costs a list of paths."""
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        narrow(self.file.parent, follow=True)
        descriptor = open_private(self.file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            data = os.pread(descriptor, LARGEST_FILE, 0)
            content = {kind: _entries(data, kind) for kind in (CONTEXTS, MODELS)}
            yield content
            newest = {
                kind: dict(sorted(entries.items(), key=lambda entry: -entry[1])[:MOST_ENTRIES])
                for kind, entries in content.items()
            }
            written = json.dumps(newest).encode()
            os.pwrite(descriptor, written, 0)
            os.ftruncate(descriptor, len(written))
        finally:
            os.close(descriptor)


def _entries(data: bytes, kind: str) -> dict[str, float]:
    found: dict[str, float] = {}
    with suppress(ValueError, AttributeError, RecursionError):
        content: Any = json.loads(data)
        for path, at in content.get(kind, {}).items():
            if os.path.isabs(path) and "\0" not in path and isinstance(at, int | float) and at >= 0:
                found[path] = float(at)
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))
