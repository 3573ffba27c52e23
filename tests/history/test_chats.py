"""The conversations held last: a bounded number of private files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from l4ctx.history import chats
from l4ctx.history.chats import Chats


def test_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "MOST_CHATS", 3)
    monkeypatch.setattr(chats, "MOST_BYTES", 10)
    kept = Chats(tmp_path / "state")
    assert kept.files() == [] and kept.clear() == 0
    made = []
    for number in range(4):
        file = kept.new()
        file.write_text("x" * (number + 1))
        os.utime(file, ns=(number, number))
        made.append(file)
    assert kept.files() == made[:0:-1]  # room was made for the fourth one, and 2 + 3 + 4 characters fit
    assert kept.folder.stat().st_mode & 0o077 == 0 and kept.folder.parent.stat().st_mode & 0o077 == 0
    made[3].write_text("x" * 11)
    kept.new()
    assert kept.files() == []  # the newest is too large to keep any
    (kept.folder / "other.txt").touch()
    (kept.folder / "link.jsonl").symlink_to(made[0])
    made[1].touch()
    assert kept.clear() == 1 and len(list(kept.folder.iterdir())) == 2
