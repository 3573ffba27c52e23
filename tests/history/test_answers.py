"""The log of answers: by many at once, bounded, private, and whole whatever lies in its files."""

from __future__ import annotations

import errno
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from l4ctx.history import answers
from l4ctx.history.answers import AnswerLog, matches
from l4ctx.history.seen import CONTEXTS, MODELS, Seen


def record(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "time": "2026-01-02T03:04:05+00:00",
        "question": f"Question {number}?",
        "answer": f"Answer {number}.",
        "sources": ["a.md"],
        **changes,
    }


def test_many_append_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each opens the file for itself, as processes do, and the file changes under them again and again."""
    monkeypatch.setattr(answers, "LARGEST_FILE", 4096)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: AnswerLog(tmp_path).append(record(number)), range(400)))
    log = AnswerLog(tmp_path)
    kept = [int(entry["question"][len("Question ") : -1]) for entry in log.records()]
    assert len(set(kept)) == len(kept) and 20 < len(kept) < 100
    assert max(log.file.stat().st_size, log.older.stat().st_size) <= 4096
    assert sorted(os.listdir(tmp_path)) == ["answers.jsonl", "answers.old.jsonl"]
    assert log.clear() == 2 and log.clear() == 0 and list(log.records()) == []


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        AnswerLog(tmp_path / "state" / "l4ctx").append(record())
        Seen(tmp_path / "state" / "l4ctx").add(MODELS, Path("m"))
    finally:
        os.umask(before)
    folder = tmp_path / "state" / "l4ctx"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def test_long_texts_and_many_documents_are_bounded(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    log.append(record(answer="x" * 10**6, sources=[f"{number}.md" for number in range(250)]))
    (kept,) = log.records()
    assert len(kept["answer"]) == answers.LONGEST_TEXT and len(kept["sources"]) == 100 and kept["more_sources"] == 150


def test_what_is_damaged_is_passed_over(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    log.append(record(1))
    with log.file.open("ab") as file:
        file.write(b'{"time": 5}\n[]\n\xff\xfe\n' + b"[" * 10**5 + b"\n" + json.dumps(record(2))[:30].encode())
    log.append(record(3))
    assert [entry["question"] for entry in log.records()] == ["Question 1?", "Question 3?"]
    (tmp_path / "elsewhere").write_text("")
    log.file.unlink()
    log.file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        log.append(record(4))
    assert (tmp_path / "elsewhere").read_text() == ""


def test_words_are_searched_everywhere() -> None:
    one = record(question="Where is the KEY?", answer="In the drawer.", sources=["docs/House.md"])
    for words in ([], ["key"], ["key", "DRAWER"], ["house"]):
        assert matches(one, words)
    assert not matches(one, ["key", "garden"])


# Contexts and models


def test_the_newest_come_first_and_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4ctx.history.seen.MOST_ENTRIES", 5)
    times = iter(range(100))
    monkeypatch.setattr("l4ctx.history.seen.time.time", lambda: next(times))
    seen = Seen(tmp_path)
    assert seen.entries(CONTEXTS) == {}
    for number in (*range(8), 4):
        seen.add(CONTEXTS, Path(f"/c/{number}"))
    seen.add(MODELS, Path("m"))
    assert list(seen.entries(CONTEXTS)) == ["/c/4", "/c/7", "/c/6", "/c/5", "/c/3"]
    assert list(seen.entries(MODELS)) == [str(Path("m").absolute())]
    seen.forget(CONTEXTS, Path("/c/7"))
    seen.forget(CONTEXTS, Path("/c/none"))
    assert list(seen.entries(CONTEXTS)) == ["/c/4", "/c/6", "/c/5", "/c/3"]


def test_a_damaged_list_is_begun_again(tmp_path: Path) -> None:
    for content in (
        b"\xff",
        b"[]",
        b"{",
        b'{"contexts": {"relative": 1, "/a": "x", "/ok": 2, "/b": -1}}',
        b"[" * 10**5,
    ):
        (tmp_path / "seen.json").write_bytes(content)
        assert list(Seen(tmp_path).entries(CONTEXTS)) in ([], ["/ok"])
        Seen(tmp_path).add(CONTEXTS, Path("/new"))
        assert next(iter(Seen(tmp_path).entries(CONTEXTS))) == "/new"


def test_many_note_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: Seen(tmp_path).add(CONTEXTS, Path(f"/c/{number}")), range(60)))
    assert len(Seen(tmp_path).entries(CONTEXTS)) == 60
