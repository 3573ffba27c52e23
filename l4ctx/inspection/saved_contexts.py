"""A saved context in one row of a list: tokens, bytes, model, date, and in what state it is. Imports no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from l4ctx.contexts.folder import BLOCKS, FILE, JOURNAL, is_context
from l4ctx.contexts.journal import Journal, JournalError
from l4ctx.contexts.locks import is_being_written
from l4ctx.contexts.manifest import read_manifest, saved_checkpoint
from l4ctx.contexts.states import State, replay
from l4ctx.errors import ContextError


def context_row(folder: Path) -> dict[str, Any]:
    """What a list tells of it. `state` is complete, partial, empty, being written, damaged, missing, or not a context;
    numbers that are not known are None. `written` is in seconds since 1970.
    """
    row: dict[str, Any] = {"path": str(folder), "state": "", "tokens": None, "bytes": None, "model": None}
    row["written"] = None
    if not os.path.lexists(folder / FILE):
        return row | {"state": "missing" if not os.path.lexists(folder) else "not a context"}
    row["bytes"] = _bytes(folder)
    with suppress(OSError):
        row["written"] = max(os.stat(folder / name).st_mtime for name in (FILE, JOURNAL) if (folder / name).exists())
    try:
        recipe, model = read_manifest(folder), saved_checkpoint(folder)
        row["model"] = None if model is None else str(model)
        states = replay(folder / JOURNAL, _records(folder), recipe.block_tokens)
    except (ContextError, JournalError, OSError):
        return row | {"state": "damaged" if is_context(folder) else "not a context"}
    newest: State | None = states[-1] if states else None
    if newest is not None:
        row["tokens"] = newest.kept(recipe.block_tokens)
    told = "empty" if newest is None else "complete" if newest.is_complete else "partial"
    return row | {"state": "being written" if is_being_written(folder) else told}


def _records(folder: Path) -> list[dict[str, Any]]:
    try:
        return Journal.read(folder / JOURNAL)
    except FileNotFoundError:  # of one that has just been begun
        return []


def _bytes(folder: Path) -> int | None:
    total = 0
    try:
        for place in (folder, folder / BLOCKS):
            with suppress(FileNotFoundError), os.scandir(place) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        total += entry.stat(follow_symlinks=False).st_size * entry.is_file(follow_symlinks=False)
    except OSError:
        return None
    return total
