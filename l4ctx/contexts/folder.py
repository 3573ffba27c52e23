"""What lies in the folder of a saved context, by name."""

from __future__ import annotations

import json
from pathlib import Path

from l4ctx.machine.files import read_small

FORMAT, VERSION = "l4ctx context", 1
FILE = "manifest.json"
JOURNAL, HEAD, WRITER_LOCK, READERS_LOCK, BLOCKS = "journal", "head.json", "writer.lock", "readers.lock", "blocks"
"""The names of what lies beside it in the folder; l4ctx.contexts.reader says what each is."""


def is_context(folder: str | Path) -> bool:
    """Whether a folder is a saved context, or one that is being made: not a document, nor a folder of them."""
    try:
        return json.loads(read_small(Path(folder) / FILE))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
