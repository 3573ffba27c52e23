"""Helpers that inspect checkpoints and contexts, and damage their files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from l4ctx.cli.tables.inspection import listing
from l4ctx.inspection.folder import exit_code, inspect_folder
from support.cli_runner import CONTROLS

Break = Callable[[Path], object]


def inspected(folder: Path, *, verify: bool = False) -> tuple[dict[str, Any], str]:
    """The report, checked to be plain JSON, and the listing, checked to be safe on a terminal."""
    before = snapshot(folder)
    report = inspect_folder(str(folder), verify=verify)
    assert json.loads(json.dumps(report, allow_nan=False)) is not None
    text = listing(report)
    assert not CONTROLS.search(text) and "\t" not in text
    assert snapshot(folder) == before, "inspection changes nothing"
    return report, text


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


def whats(report: dict[str, Any]) -> list[str]:
    return [entry["what"] for entry in report["damage"]]


def check_damage(report: dict[str, Any], damage: list[str]) -> None:
    """Checks that the checkpoint's damage has exactly these lines; `damage` holds a part of each."""
    found = whats(report)
    assert exit_code(report) == 3 and len(found) == len(damage), found
    for part, line in zip(damage, found, strict=True):
        assert part in line


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def cut(file: Path, length: int = -1) -> None:
    file.write_bytes(file.read_bytes()[:length])


def pipe(file: Path) -> None:
    """Replaces the file with a named pipe."""
    file.unlink()
    os.mkfifo(file)


def randomly_damaged(folder: Path, chance: random.Random, limit: int = 10**9) -> Iterator[Path]:
    """Each file of the folder in turn, with some bytes among its first `limit` changed, inserted or removed."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        kept, data = file.read_bytes(), bytearray(file.read_bytes())
        for _ in range(chance.randrange(1, 4) if data else 0):
            at = chance.randrange(min(len(data), limit))
            data[at : at + chance.randrange(3)] = bytes(chance.choices(b'\0"[]{},:9-\xff', k=chance.randrange(3)))
        file.write_bytes(data)
        yield file
        file.write_bytes(kept)
