"""The head of a saved context: which journal record ends its newest complete state.

A journal that was cut off after a line is still a valid journal: the head tells that records are missing. It is
replaced atomically once a state's last record is durable, so that a crash may leave it older than the journal, but
never newer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l4ctx.contexts.folder import HEAD, JOURNAL, RECREATE, digest, read_json, typed
from l4ctx.errors import ContextError
from l4ctx.machine.files import write_atomically


def read_head(folder: Path) -> tuple[int, str] | None:
    """The number of the record that ends the newest complete state, and its digest. Raises ContextError."""
    file = folder / HEAD
    try:
        head = read_json(file)
        return typed(head["records"], int), typed(head["end"], str)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ContextError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ContextError(f"{file}: damaged ({type(error).__name__}: {error}); {RECREATE}") from None


def update_head(folder: Path, records: list[dict[str, Any]]) -> None:
    """Makes the head name the last record that ends a state, unless it does. Raises ContextError and OSError."""
    last = max((n for n, record in enumerate(records, 1) if record["type"] == "end"), default=0)
    if not last:
        return
    end = digest(records[last - 1])
    if read_head(folder) != (last, end):
        write_atomically(folder / HEAD, json.dumps({"records": last, "end": end}) + "\n")


def check_head(folder: Path, head: tuple[int, str] | None, records: list[dict[str, Any]]) -> None:
    """Raises ContextError where the journal lacks the end of the newest complete state."""
    if head is None:
        if any(record.get("type") == "end" for record in records[:-1]):
            raise ContextError(
                f"{folder / HEAD}: missing, so that nothing tells whether the journal is whole; {RECREATE}"
            )
        return
    number, expected = head
    if not 0 < number <= len(records) or digest(records[number - 1]) != expected:
        raise ContextError(
            f"{folder / JOURNAL}: cut short, or {HEAD} beside it is damaged: it has {len(records)} "
            f"records, and number {number} should be the end of the newest state; {RECREATE}"
        )
