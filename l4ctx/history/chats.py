"""The files of the conversations held last, for `l4ctx chat --last`. Does not know what is in them."""

from __future__ import annotations

import datetime
import os
from contextlib import suppress
from pathlib import Path

from l4ctx.machine.places import state_folder
from l4ctx.machine.private import FOLDER_MODE, narrow

MOST_CHATS, MOST_BYTES = 20, 2**26
"""Of all together; the oldest are deleted as a new one is begun."""


class Chats:
    """A file for each conversation, readable for its owner alone."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or state_folder()) / "chats"

    def files(self) -> list[Path]:
        """The one that was written to last comes first."""
        return [file for file, _ in self._with_sizes()]

    def _with_sizes(self) -> list[tuple[Path, int]]:
        try:
            found = [
                (entry.stat().st_mtime_ns, Path(entry.path), entry.stat().st_size)
                for entry in os.scandir(self.folder)
                if entry.name.endswith(".jsonl") and entry.is_file(follow_symlinks=False)
            ]
        except OSError:
            return []
        return [(file, size) for _, file, size in sorted(found, reverse=True)]

    def new(self) -> Path:
        """The name of a file for a new conversation, for which the oldest one makes room. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        narrow(self.folder.parent, follow=True)
        narrow(self.folder, follow=True)
        total = 0
        for number, (file, size) in enumerate(self._with_sizes(), 1):
            total += size
            if number >= MOST_CHATS or total > MOST_BYTES:
                with suppress(OSError):
                    file.unlink()
        begun = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        return self.folder / f"{begun}-{os.getpid()}-{os.urandom(2).hex()}.jsonl"

    def clear(self) -> int:
        """Deletes all; returns how many there were. Raises OSError."""
        files = self.files()
        for file in files:
            file.unlink(missing_ok=True)
        return len(files)
