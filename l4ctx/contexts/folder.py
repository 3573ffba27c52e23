"""The folder of a saved context: what a model has read, once, kept to be asked many times.

    manifest.json               what it was made with (l4ctx.contexts.manifest); never changed
    journal                     what is sealed, and which documents; append-only (l4ctx.contexts.journal, .states)
    head.json                   the newest complete state (l4ctx.contexts.head): tells a journal that was cut short
    tokens-*.safetensors        token ids, documents and the order for drafts of a state, written once
    blocks/*.safetensors        a sealed block of every NoPE layer each
    tail-*.safetensors          the tokens behind the last sealed block, with the RoPE layers' windows
    writer.lock, readers.lock   one writer at a time; old blocks are deleted only while nobody reads

Data files have random names and are never written again, and a file counts once the journal names it. So a reader,
which goes by the journal as it was when it came, is not disturbed, and what a crash leaves behind is either whole or
not part of the context.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from model.bounds import shown
from model.folder import read_regular

T = TypeVar("T")

FORMAT, VERSION = "l4ctx context", 1
FILE = "manifest.json"
JOURNAL, HEAD, WRITER_LOCK, READERS_LOCK, BLOCKS = "journal", "head.json", "writer.lock", "readers.lock", "blocks"
MAX_JSON_BYTES = 2**20
"""Of manifest.json and head.json, which have a few thousand."""


def read_json(file: Path) -> Any:
    """What a small file of a context says. Raises OSError, ValueError and RecursionError.

    Links are not followed, and nothing is waited for: what belongs to a context lies in its folder.
    """
    return json.loads(read_regular(file, MAX_JSON_BYTES, follow=False))


def typed(value: Any, kind: type[T]) -> T:
    """A value of a context's JSON, which must be exactly of that type. Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(f"{shown(value)} is not of type {kind.__name__}")
    return value


def digest(record: dict[str, Any]) -> str:
    """The SHA-256, in hex, of what a manifest or a journal's record says, in whatever order."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


RECREATE = "create the context again"
"""The remedy where nothing of a context can be used. A message that ends with it says so to `l4ctx inspect`."""


def is_context(folder: str | Path) -> bool:
    """Whether a folder is a saved context, complete or not: neither a document nor a folder of documents."""
    try:
        return read_json(Path(folder) / FILE)["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
