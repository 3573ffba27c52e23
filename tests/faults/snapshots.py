"""What a folder holds, as digests: its bytes, and a saved context's newest complete state."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def tree(top: Path, without: str = "") -> str:
    """A digest of all names and bytes below a folder, but a folder in it."""
    digest = hashlib.sha256()
    for folder, names, files in os.walk(top):
        names[:] = sorted(name for name in names if name != without)
        for name in sorted([*names, *files]):
            path = Path(folder, name)
            digest.update(f"{path.relative_to(top)}\0".encode())
            if path.is_file():
                content = path.read_bytes()
                digest.update(f"{len(content)}\0".encode() + content)
    return digest.hexdigest()


def context(folder: Path) -> str:
    """A digest of all that the newest complete state says, every checksum verified; "" where there is none, else a
    word of what is wrong."""
    from cache.errors import DiskError
    from l4ctx.contexts.reader import Context
    from l4ctx.errors import ContextError

    if not folder.exists() or not any(folder.iterdir()):
        return ""
    try:
        state = (read := Context.read(folder)).complete
    except ContextError as error:
        return f"unreadable: {error}".replace(str(folder), "ctx")
    if state is None:
        return ""
    digest = hashlib.sha256(json.dumps([state.tokens, state.system]).encode())
    try:
        for stored in [state.ids, *state.blocks, *([state.tail] if state.tail else [])]:
            file = read.file(stored)
            file.verify()
            for name, unit in sorted(file.units.items()):
                content = bytearray(unit.nbytes)
                file.read(name, memoryview(content))
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
    except DiskError as error:
        return f"damaged: {error}".replace(str(folder), "ctx")
    return digest.hexdigest()
