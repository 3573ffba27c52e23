"""Checkpoints that a person can name: those of the settings, of the hub's cache, and those used before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from l4ctx.inspection.model_names import cached_models, meant_model
from model.folder import CONFIG
from model.gguf.files import find_gguf

_WEIGHTS = (".safetensors", ".gguf")


def model_rows(names: Mapping[str, str], used: Mapping[str, float]) -> list[dict[str, Any]]:
    """One for each place: its name, if it has one, its bytes of weights, when it was last used, in seconds since 1970,
    and whether it is here. `names` are places by short name, `used` the times of paths that were used.
    """
    places: dict[str, str | None] = {}
    for name, path in cached_models().items():
        if "llama" in name.casefold():
            places[str(path)] = name
    for name in names:
        places[os.path.abspath(meant_model(names[name], {}))] = name
    for place in used:
        places.setdefault(place, None)
    rows = [_row(Path(place), name, used.get(place)) for place, name in places.items()]
    return sorted(rows, key=lambda row: (-(row["last_used"] or 0), row["name"] or "", row["path"]))


def _row(path: Path, name: str | None, last_used: float | None) -> dict[str, Any]:
    is_model = os.path.lexists(path / CONFIG) or find_gguf(path) is not None
    state = "here" if is_model else "no checkpoint" if os.path.lexists(path) else "missing"
    size = _bytes(path) if is_model else None
    return {"name": name, "path": str(path), "bytes": size, "last_used": last_used, "state": state}


def _bytes(path: Path) -> int | None:
    """Of weights, also where they are links to a cache's files."""
    try:
        files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in _WEIGHTS]
        total = 0
        for file in files:
            with suppress(FileNotFoundError):
                total += file.stat().st_size
    except OSError:
        return None
    return total
